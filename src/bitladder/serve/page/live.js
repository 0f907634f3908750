// What each tier is doing now. Asks only while it is seen.

import { getJson } from "./api.js";
import { h, refill } from "./dom.js";
import { ago, DASH, fixed, percent, seconds } from "./format.js";

const EVERY_MS = 2000;

export async function showLive(panel) {
  const body = h("div");
  refill(panel, h("h2", { class: "visually-hidden" }, "Live"), body);
  refill(body, ...view(await getJson("/bitladder/api/live")));
  setInterval(async () => {
    if (panel.hidden || document.hidden) return;
    try {
      refill(body, ...view(await getJson("/bitladder/api/live", { quiet: true })));
    } catch (error) {
      refill(body, h("p", { class: "note bad" }, `The gateway does not answer: ${error.message}`));
    }
  }, EVERY_MS);
}

function view(live) {
  return [
    ...(live.shadow?.alarm ? [h("p", { class: "note bad", role: "alert" }, alarm(live.shadow))] : []),
    ...(live.notes ?? []).map((note) => h("p", { class: "note" }, note)),
    h("div", { class: "tiers" }, ...live.tiers.map(tierCard)),
    h(
      "section",
      { "aria-labelledby": "routing-title" },
      h("h2", { id: "routing-title" }, "How requests are routed"),
      ...routing(live),
    ),
    ...(live.shadow ? [shadowView(live.shadow)] : []),
    h(
      "section",
      { "aria-labelledby": "recent-title" },
      h("h2", { id: "recent-title" }, "Latest requests"),
      recent(live.recent),
    ),
  ];
}

const alarm = (shadow) =>
  `The tiers gave the very same answer in ${percent(shadow.agreement, 0)} of the cases compared, fewer than the ` +
  `${percent(shadow.bar, 0)} expected from the workload: the work has drifted from the workload.`;

function tierCard(tier) {
  const facts = [
    ["State", tier.state, "ready, loading, stopped or failed"],
    ["Running", `${tier.running} of ${tier.slots}`, "requests that are being answered, of those possible at once"],
    ["Waiting", tier.queued, "requests in the queue"],
    ["First byte", seconds(tier.first_byte_s?.p50), "time to the first byte: half of the answers are faster"],
    ["95% within", seconds(tier.first_byte_s?.p95), "time in which 95 of 100 answers send their first byte"],
    ["Tokens/s", fixed(tier.tokens_per_s?.p50, 1), "while answering: half of the answers are faster"],
    ["Answered", tier.outcomes?.complete ?? 0, "requests answered to their end"],
    ["Restarts", tier.restarts, "how often the engine was started again"],
  ];
  return h(
    "article",
    { class: `tier ${tier.tier}` },
    h("h3", {}, h("span", { class: "mark", "aria-hidden": "true" }), `${tier.tier} tier`),
    h("p", { class: "level" }, tier.level),
    h(
      "dl",
      {},
      ...facts.map(([name, value, means]) =>
        h("div", { title: means }, h("dt", {}, name), h("dd", {}, String(value))),
      ),
    ),
    h("p", { class: "soft small" }, tier.resident ? "Stays in memory." : "Takes turns in memory."),
    tier.engine && h("p", { class: "soft small" }, `Engine: ${tier.engine}`),
    tier.last_error && h("p", { class: "bad small" }, tier.last_error),
    tier.file_sha256 && h("p", { class: "soft small hash" }, `SHA-256 ${tier.file_sha256}`),
    evidence(tier),
    tier.guesses ? guesses(tier.guesses) : null,
    tier.replicas?.length ? replicas(tier.replicas) : null,
  );
}

// Whether a tier guesses tokens ahead, how often it is right, and what that gains on the requests that came.
function guesses(told) {
  const right = told.acceptance == null ? "" : `, ${percent(told.acceptance, 0)} of the guesses are right`;
  const lines = [`Guesses tokens ahead (${told.from}): ${told.on ? "on" : "off"}${told.on ? right : ""}.`];
  if (told.because) lines.push(`${told.because[0].toUpperCase()}${told.because.slice(1)}.`);
  for (const [tag, one] of Object.entries(told.by_tag ?? {})) {
    const said = [];
    if (one.times_as_fast != null)
      said.push(`${fixed(one.times_as_fast, 2)} times as fast with guesses (${one.answers_with} and ` +
        `${one.answers_without} answers)`);
    if (one.acceptance != null) said.push(`${percent(one.acceptance, 0)} of its guesses are right`);
    if (one.apart) said.push(`answered ${told.on ? "without" : "with"} guesses, by the tier's second engine`);
    if (said.length) lines.push(`${tag}: ${said.join(", ")}.`);
  }
  return h("ul", { class: "soft small" }, ...lines.map((line) => h("li", {}, line)));
}

// A line for each address of a tier that has several.
const replicas = (all) =>
  h(
    "ul",
    { class: "soft small" },
    ...all.map((one) =>
      h(
        "li",
        { class: one.state === "up" ? "" : "bad" },
        `${one.replica}: ${one.state}, ${one.running} running, ${one.answered} answered` +
          (one.first_byte_s == null ? "" : `, first byte ${seconds(one.first_byte_s)}`) +
          (one.state === "out" && one.last_error ? ` (${one.last_error})` : ""),
      ),
    ),
  );

// What evidence there is of the very file that is served; its note stands at the top.
function evidence(tier) {
  if (tier.evidence === "measured") return h("p", { class: "soft small" }, "This very file was measured.");
  if (tier.evidence === "changed") return h("p", { class: "bad small" }, "Not the file that was measured.");
  if (tier.evidence === "unmeasured") return h("p", { class: "bad small" }, "This file was never measured.");
  return null;
}

const ROUTED = {
  header: "tier named in a header",
  model: "tier named as the model",
  level: "level named as the model",
  rule: "your rule",
  auto: "chosen here (auto)",
  "": "refused: malformed, without a valid key, or from a foreign page",
};
const OUTCOMES = {
  complete: "answered",
  refused: "refused",
  "client left": "client left",
  cut: "broke off",
  error: "failed",
};

function routing(live) {
  const kinds = Object.entries(live.routing ?? {});
  if (!kinds.length) return [h("p", { class: "soft" }, "No requests yet.")];
  return [
    h(
      "table",
      { class: "shares" },
      h("thead", {}, h("tr", {}, ...["Routed by", "Requests", "Share"].map((name) => h("th", { scope: "col" }, name)))),
      h(
        "tbody",
        {},
        ...kinds.map(([kind, { requests, share }]) =>
          h(
            "tr",
            {},
            h("th", { scope: "row" }, ROUTED[kind] ?? kind),
            h("td", {}, requests.toLocaleString("en")),
            h("td", {}, h("span", { class: "share", style: `--share: ${share}` }, percent(share, 0))),
          ),
        ),
      ),
    ),
  ];
}

function shadowView(shadow) {
  const between = shadow.low === null ? "" : ` (${percent(shadow.low, 0)} to ${percent(shadow.high, 0)})`;
  const agreement =
    shadow.agreement === null
      ? "Nothing compared yet."
      : `In ${percent(shadow.agreement, 0)} of cases both tiers gave the very same answer${between}.`;
  const about =
    `${percent(shadow.share, 0)} of the speed tier's requests are sent to the quality tier as well, in idle time; ` +
    `${shadow.compared} compared, ${shadow.waiting} waiting. The alarm is at ${percent(shadow.bar, 0)}.`;
  return h(
    "section",
    { "aria-labelledby": "shadow-title" },
    h("h2", { id: "shadow-title" }, "Shadow agreement"),
    h("p", {}, agreement),
    h("p", { class: "soft small" }, about),
  );
}

function recent(list) {
  if (!list?.length) return h("p", { class: "soft" }, "No requests yet.");
  const columns = ["When", "Served by", "Why", "First byte", "Tokens/s", "Outcome"];
  const rows = list
    .slice(0, 30)
    .map((line) =>
      h(
        "tr",
        { class: line.outcome === "complete" ? null : "odd" },
        h("td", {}, ago(line.at)),
        h("th", { scope: "row" }, line.tier ? `${line.tier} (${line.level})` : DASH),
        h(
          "td",
          { class: "why" },
          line.reason || DASH,
          line.escalated && h("span", { class: "soft small" }, " escalated"),
        ),
        h("td", {}, seconds(line.first_s)),
        h("td", {}, fixed(line.tokens_per_s, 1)),
        h("td", {}, OUTCOMES[line.outcome] ?? line.outcome),
      ),
    );
  const head = h("thead", {}, h("tr", {}, ...columns.map((name) => h("th", { scope: "col" }, name))));
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": "Latest requests" },
    h("table", { class: "recent" }, head, h("tbody", {}, ...rows)),
  );
}
