// What stands behind a number: its definition, its interval, what it was measured on, and how to get it again.

import { wordDiff } from "./diff.js";
import { copyButton, h, refill } from "./dom.js";
import { facts } from "./facts.js";
import { bytes, DASH, fixed, percent, range, small } from "./format.js";

const WINDOWED = "Every token of the text gets a probability from both models, on the very same tokens.";

const KINDS = {
  file: {
    title: "File size",
    means: "Bytes of the file as written, metadata and tokenizer included.",
    rows: ({ plan, file }) => [
      ["Bits per weight", fixed(file?.bpw ?? plan.bpw, 3)],
      ["Weights of the named type", percent(plan.on_label_share, 1)],
      ["Tensors that do not divide that way", plan.fallbacks],
      ["Path", file?.path],
      ["SHA-256", file?.sha256],
    ],
  },
  memory: {
    title: "Memory at the context",
    means: "Weights, KV cache and compute buffers.",
    rows: ({ plan }) => [
      ["Weights", bytes(plan.tensor_bytes)],
      ["KV cache", bytes(plan.kv_bytes)],
      ["Compute buffers", bytes(plan.compute_bytes)],
      ["Together", bytes(plan.total_bytes)],
      ["Verdict", plan.reason],
    ],
  },
  speed: {
    title: "Speed",
    means: "Measured through the real engine, one request at a time; medians.",
    rows: ({ result }) => [
      ["Decode", `${small(result.decode_tokens_per_s)} tokens/s`],
      ["Prefill", `${small(result.prefill_tokens_per_s)} tokens/s`],
    ],
  },
  kl: {
    title: "KL divergence",
    means: `How far the level's next-token probabilities lie from the source's, nats per token. ${WINDOWED}`,
    rows: ({ fidelity: f }) => [
      ["Mean", small(f.kl_mean)],
      ["95% interval", range(f.kl_low, f.kl_high, small)],
      ["Median", small(f.kl_median)],
      ["99th percentile", small(f.kl_p99)],
      ["Largest", small(f.kl_max)],
      ["Tokens", f.tokens.toLocaleString("en")],
      ["Resampled", `${f.units} ${f.unit}s`],
    ],
  },
  ppl: {
    title: "Perplexity ratio",
    means: `Perplexity of the level over the source's. It can fall under 1 by luck; KL cannot. ${WINDOWED}`,
    rows: ({ fidelity: f }) => [
      ["Ratio", fixed(f.ppl_ratio, 4)],
      ["95% interval", range(f.ppl_ratio_low, f.ppl_ratio_high, (value) => fixed(value, 4))],
      ["Level", fixed(f.ppl, 3)],
      ["Source", fixed(f.ppl_reference, 3)],
      ["Tokens", f.tokens.toLocaleString("en")],
    ],
  },
  top1: {
    title: "Top-1 agreement",
    means: `How often both think the same token most likely. ${WINDOWED}`,
    rows: ({ fidelity: f }) => [
      ["Share", percent(f.top1, 2)],
      ["95% interval", range(f.top1_low, f.top1_high, (value) => percent(value, 2))],
      ["Tokens", f.tokens.toLocaleString("en")],
    ],
  },
  passes: {
    title: "Passes",
    means: "Inputs of the workload whose answer met its criterion, through the real engine.",
    rows: ({ result: r }) => [
      ["Passed", `${r.passes} of ${r.inputs}`],
      ["95% interval (Wilson)", range(r.pass_low, r.pass_high, (share) => percent(share, 0))],
      ["Lost against the source", r.lost.join(", ") || "none"],
      ["Gained", r.gained.join(", ") || "none"],
      ["The very same words", r.same_answers],
      ["McNemar's p", small(r.p_value)],
    ],
  },
};

/** Open the dialog for one number of one level. */
export function showEvidence(run, row, kind) {
  const { title, means, rows } = KINDS[kind];
  open(run, `${title} of ${row.level}`, means, [
    list(rows(row)),
    ...(kind === "passes" ? flips(run, row.level, [...row.result.lost, ...row.result.gained]) : []),
  ]);
}

/** Open the dialog for what one kind of work lost at one level. */
export function showTagEvidence(run, { tag, level, inputs, lost, gained, loss_low, loss_high, status }) {
  const result = run.results.find((one) => one.level === level);
  const tagged = new Set(run.inputs.filter((one) => one.tags.includes(tag)).map((one) => one.id));
  const of = (ids) => ids.filter((id) => tagged.has(id));
  const points = (share) => `${fixed(100 * share, 0)} points`;
  const means =
    "Inputs with this tag that the reference passed and this level did not (lost), and the other way round (gained).";
  open(run, `${tag} at ${level}`, means, [
    list([
      ["Verdict", status],
      ["Inputs", inputs],
      ["Lost", lost ? `${lost}: ${of(result.lost).join(", ")}` : "none"],
      ["Gained", gained ? `${gained}: ${of(result.gained).join(", ")}` : "none"],
      ["Loss, 95% interval (Tango)", range(loss_low, loss_high, points)],
    ]),
    ...flips(run, level, of([...result.lost, ...result.gained])),
  ]);
}

function open(run, title, means, content) {
  const dialog = document.getElementById("evidence");
  refill(
    dialog,
    h("form", { method: "dialog", class: "close" }, h("button", { "aria-label": "Close" }, "×")),
    h("h2", { id: "evidence-title" }, title),
    h("p", { class: "soft" }, means),
    ...content,
    h("h3", {}, "How to get it again"),
    h("pre", { tabindex: 0 }, run.commands.join("\n")),
    h("p", { class: "actions" }, copyButton(run.commands.join("\n"))),
    list([
      ["Source", run.source.location],
      ["SHA-256 of the source", run.source.sha256],
      ["Measured", run.created],
      ["Bitladder", run.bitladder],
      ...facts(run.settings),
      [
        "Versions",
        Object.entries(run.versions)
          .map((pair) => pair.join(" "))
          .join(", "),
      ],
    ]),
  );
  dialog.showModal();
  dialog.scrollTop = 0;
}

const list = (rows) =>
  h(
    "dl",
    {},
    ...rows
      .filter(([, value]) => value !== undefined && value !== "" && value !== null)
      .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value ?? DASH)))),
  );

/** The answers behind lost and gained inputs, where the run kept them. */
function flips(run, level, ids) {
  const answer = (of, id) =>
    run.answers.find((one) => one.level === of)?.answers.find((one) => one.input_id === id) ?? null;
  const mark = { same: (text) => text, added: (text) => h("ins", {}, text), removed: (text) => h("del", {}, text) };
  return ids.flatMap((id) => {
    const [reference, own] = [answer(run.reference || run.source.level, id), answer(level, id)];
    const input = run.inputs.find((one) => one.id === id);
    if (!reference || !own) return [];
    const marked = wordDiff(reference.text, own.text).map(({ kind, text }) => mark[kind](text));
    return [
      h(
        "article",
        { class: "flip" },
        h("h3", {}, id),
        h("p", { class: "soft" }, input?.prompt ?? ""),
        h("p", { class: "text" }, ...marked),
        h("p", { class: "soft small" }, own.detail),
      ),
    ];
  });
}
