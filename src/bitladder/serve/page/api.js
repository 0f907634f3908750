// The gateway's HTTP surface, as any client sees it.

let key = sessionStorage.getItem("bitladder-key") ?? "";

/** An HTTP error with the gateway's own words. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function askForKey() {
  const dialog = document.getElementById("key-dialog");
  if (dialog.open) return false;
  dialog.returnValue = "cancel";
  dialog.showModal();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  if (dialog.returnValue !== "ok") return false;
  key = dialog.querySelector("input").value.trim();
  sessionStorage.setItem("bitladder-key", key);
  return true;
}

async function call(path, options = {}) {
  for (;;) {
    const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
    const reply = await fetch(path, { ...options, headers });
    if (reply.status === 401 && !options.quiet && (await askForKey())) continue;
    if (reply.ok) return reply;
    const said = await reply.json().catch(() => null);
    throw new ApiError(reply.status, said?.error?.message ?? `The gateway answered with status ${reply.status}.`);
  }
}

/** JSON from a path, or null when there is none (404). */
export async function getJson(path, { quiet = false } = {}) {
  try {
    const reply = await call(path, { quiet });
    return await reply.json();
  } catch (error) {
    if (error instanceof ApiError && error.status === 404) return null;
    throw error;
  }
}

/**
 * Stream a chat answer. `onToken({token, logprob, top})` is called for each token, `onText(text)` for each piece of
 * text. Resolves to `{tier, level, reason, finish, first, seconds, tokens}` (times in seconds).
 */
export async function streamChat(body, { onText, onToken, signal }) {
  const began = performance.now();
  const request = { ...body, stream: true, logprobs: true, top_logprobs: 8 };
  const reply = await call("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  const told = {
    tier: reply.headers.get("x-bitladder-tier"),
    level: reply.headers.get("x-bitladder-level"),
    reason: reply.headers.get("x-bitladder-reason"),
    finish: null,
    first: null,
    seconds: 0,
    tokens: 0,
  };
  for await (const event of events(reply.body)) {
    if (event === "[DONE]") break;
    const data = JSON.parse(event);
    if (data.error) throw new ApiError(502, data.error.message ?? "The answer broke off.");
    const choice = data.choices?.[0];
    if (!choice) continue;
    const text = choice.delta?.content ?? "";
    const entries = choice.logprobs?.content ?? [];
    if (text || entries.length) told.first ??= (performance.now() - began) / 1000;
    if (text) onText(text);
    for (const entry of entries) onToken({ token: entry.token, logprob: entry.logprob, top: entry.top_logprobs ?? [] });
    told.tokens += entries.length || (text ? 1 : 0);
    told.finish = choice.finish_reason ?? told.finish;
  }
  told.seconds = (performance.now() - began) / 1000;
  if (told.finish === null) throw new ApiError(502, "The answer broke off before its end.");
  return told;
}

/** The `data:` payloads of a server-sent event stream. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}
