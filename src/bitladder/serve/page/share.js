// A comparison as a link or a file. A link carries everything in its fragment, which browsers never send to a server.

const PREFIX = "#compare=";

const through = async (data, stream) =>
  new Uint8Array(await new Response(new Blob([data]).stream().pipeThrough(stream)).arrayBuffer());

/** A link that shows this comparison, wherever the page is served. */
export async function toLink(record) {
  const packed = await through(new TextEncoder().encode(JSON.stringify(record)), new CompressionStream("deflate-raw"));
  let text = "";
  for (const byte of packed) text += String.fromCharCode(byte);
  const safe = btoa(text).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  return `${location.origin}${location.pathname}${PREFIX}${safe}`;
}

/** The comparison in an address's fragment, or null. */
export async function readLink(hash) {
  if (!hash.startsWith(PREFIX)) return null;
  const text = atob(hash.slice(PREFIX.length).replaceAll("-", "+").replaceAll("_", "/"));
  const unpacked = await through(
    Uint8Array.from(text, (letter) => letter.charCodeAt(0)),
    new DecompressionStream("deflate-raw"),
  );
  return readRecord(JSON.parse(new TextDecoder().decode(unpacked)));
}

const text = (value, most = 1e6) => (typeof value === "string" ? value.slice(0, most) : "");
const number = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);

/** A record from outside, field by field: a stranger may have written it. */
export function readRecord(data) {
  if (data?.version !== 1 || !Array.isArray(data.answers) || data.answers.length < 2)
    throw new Error("it is not one of ours");
  const answers = data.answers.slice(0, 8).map((answer) => ({
    level: text(answer?.level, 100),
    tier: text(answer?.tier, 20),
    text: text(answer?.text),
    error: text(answer?.error, 1000),
    finish: text(answer?.finish, 40),
    count: number(answer?.count) ?? 0,
    first: number(answer?.first),
    seconds: number(answer?.seconds) ?? 0,
    parting: readParting(answer?.parting),
  }));
  return {
    version: 1,
    at: number(data.at) ?? 0,
    prompt: text(data.prompt),
    system: text(data.system),
    settings: {
      max_tokens: number(data.settings?.max_tokens) ?? 256,
      temperature: number(data.settings?.temperature) ?? 0,
    },
    blind: data.blind === true,
    vote: typeof data.vote === "string" ? data.vote.slice(0, 100) : null,
    answers,
  };
}

function readParting(data) {
  if (!data || !["tie-break", "diverged", "ended"].includes(data.kind)) return null;
  const tokens = [0, 1].map((n) => (typeof data.tokens?.[n] === "string" ? data.tokens[n].slice(0, 200) : null));
  const chances = Array.isArray(data.chances)
    ? [0, 1].map((n) => [0, 1].map((m) => number(data.chances[n]?.[m])))
    : null;
  return { at: number(data.at) ?? 0, tokens, chances, kind: data.kind };
}
