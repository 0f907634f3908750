// The ladder: what each level costs, which pair was chosen, and what another machine or bar would change.

import { getJson } from "./api.js";
import { lossChart } from "./chart.js";
import { announce, h, refill } from "./dom.js";
import { showEvidence, showTagEvidence } from "./evidence.js";
import { bytes, DASH, fixed, percent, range, small } from "./format.js";
import { HEADS, LOSSES, VERDICTS } from "./meanings.js";
import { whatIfForm } from "./whatif.js";

const TIERS = { "quality tier": "quality", "speed tier": "speed", "both tiers": "both" };

export async function showLadder(panel) {
  const run = await getJson("/bitladder/api/run");
  if (!run) {
    refill(
      panel,
      h(
        "p",
        { class: "note" },
        "No run is attached to this gateway. ",
        h("code", {}, "bitladder run MODEL"),
        " makes one.",
      ),
    );
    return;
  }
  const decision = h("div", { class: "decision" });
  const chart = h("div");
  const table = h("div");
  const answers = h("section", { "aria-labelledby": "answers-title" });
  const evidence = h("div");
  const show = (view) => {
    refill(decision, ...decisionView(view));
    refill(chart, chartView(run, view));
    refill(table, levelTable(run, view), ...frontView(view));
  };
  const given = { plan: run.plan, decision: run.decision };
  const form = whatIfForm(run, (view, changed) => {
    show(view ?? given);
    if (changed) announce((view ?? given).decision.summary);
  });
  show(given);
  refill(
    panel,
    h("header", { class: "page-head" }, h("h1", {}, run.source.name), h("p", { class: "soft" }, facts(run))),
    decision,
    ...warnings(run).map((warning) => h("p", { class: "note warn" }, warning)),
    form,
    h(
      "section",
      { "aria-labelledby": "cost-title" },
      h("h2", { id: "cost-title" }, "What each step down costs"),
      chart,
    ),
    h(
      "section",
      { "aria-labelledby": "levels-title" },
      h("h2", { id: "levels-title" }, "Every level"),
      h("p", { class: "soft" }, "Each number opens the evidence behind it."),
      table,
    ),
    ...tagView(run),
    answers,
    evidence,
  );
  const told = await getJson("/bitladder/api/answers");
  refill(answers, ...answersView(told));
  refill(evidence, ...(told.tables ?? []).map(evidenceTable));
}

/** What changed in the answers, in the report's own words. */
function answersView({ reference, columns, rows }) {
  if (!rows.length) return [];
  const heads = columns.map(({ title, means }) => h("th", { role: "columnheader", scope: "col", title: means }, title));
  return [
    h("h2", { id: "answers-title" }, "What changed in the answers"),
    h("p", { class: "soft" }, `Each level's answers beside those of ${reference}, over the whole workload.`),
    h(
      "div",
      { class: "scroll", tabindex: 0, role: "region", "aria-label": "What changed in the answers" },
      h(
        "table",
        { class: "changes", role: "table" },
        h(
          "thead",
          { role: "rowgroup" },
          h("tr", { role: "row" }, h("th", { role: "columnheader", scope: "col" }, "level"), ...heads),
        ),
        ...rows.map(({ level, cells, notes }) =>
          h(
            "tbody",
            { role: "rowgroup" },
            h(
              "tr",
              { role: "row" },
              h("th", { role: "rowheader", scope: "rowgroup" }, level),
              ...cells.map((cell, n) => h("td", { role: "cell", "data-label": columns[n].title }, cell)),
            ),
            notes &&
              h(
                "tr",
                { role: "row", class: "why" },
                h("td", { role: "cell", colspan: columns.length + 1 }, `${notes}.`),
              ),
          ),
        ),
      ),
    ),
    h(
      "dl",
      { class: "words small soft" },
      ...columns.map(({ title, means }) => h("div", {}, h("dt", {}, title), h("dd", {}, means))),
    ),
  ];
}

/** What deployments meet beside single questions: depth and cache, faults, thoughts, guesses; as the report has it. */
const evidenceTable = ({ name, title, lead, heads, rows }) =>
  h(
    "section",
    { "aria-labelledby": `${name}-title` },
    h("h2", { id: `${name}-title` }, title),
    h("p", { class: "soft" }, lead),
    h(
      "div",
      { class: "scroll", tabindex: 0, role: "region", "aria-label": title },
      h(
        "table",
        { class: "evidence" },
        h("thead", {}, h("tr", {}, ...heads.map((head) => h("th", { scope: "col" }, head)))),
        h("tbody", {}, ...rows.map(evidenceRow)),
      ),
    ),
  );

const evidenceRow = ([first, ...rest]) =>
  h(
    "tr",
    {},
    h("th", { scope: "row" }, first.text),
    ...rest.map(({ text, beneath, known }) => h("td", { class: known ? "known" : "" }, text, beneath && h("small", {}, beneath))),
  );

/** That the source is itself quantized is always among them when it is. */
function warnings({ source, warnings: given }) {
  const own = "The source is itself quantized: every loss is relative to that file, not to the original model.";
  return source.quantized && !given.some((one) => one.includes("itself quantized")) ? [own, ...given] : given;
}

const facts = (run) =>
  [run.source.architecture, `${run.source.level} source`, run.plan.machine, run.created.slice(0, 10)].join(" · ");

function decisionView({ plan, decision }) {
  return [
    h("p", { class: "kicker" }, "The decision"),
    h("p", { class: "summary" }, decision.summary),
    h(
      "p",
      { class: "soft" },
      "Bar: ",
      h("code", {}, decision.bar),
      ` · context ${plan.n_ctx.toLocaleString("en")} · ${bytes(plan.budget_bytes)} of memory`,
    ),
    decision.outcome !== "met" &&
      decision.next.length > 0 &&
      h(
        "div",
        { class: "note" },
        h("p", {}, "To find out more:"),
        h("ul", {}, ...decision.next.map((step) => h("li", {}, step))),
      ),
  ];
}

/** Everything known of a level. */
function levelFacts(run, { plan, decision }, level) {
  const named = (list) => list.find((one) => one.level === level) ?? null;
  return {
    level,
    plan: named(plan.levels),
    file: named(run.files),
    fidelity: named(run.fidelities),
    result: named(run.results),
    verdict: named(decision.verdicts) ?? { status: "cannot tell", reason: "not judged", loss: "not known" },
  };
}

function chartView(run, view) {
  const holder = h("div", { class: "card chart-card" });
  const rows = view.plan.levels
    .map(({ level }) => levelFacts(run, view, level))
    .filter((row) => row.fidelity && row.verdict.status !== "reference");
  const largest = Math.max(...rows.map((row) => row.plan.file_bytes), 0);
  const [unit, name] = largest >= 2 * 2 ** 30 ? [2 ** 30, "GiB"] : [2 ** 20, "MiB"];
  const axes = {
    size: overCaches(view)
      ? { title: `memory at ${context(view)} tokens of context, ${name}`, of: (row) => row.plan.total_bytes / unit, ladder: false }
      : { title: `file size, ${name}`, of: (row) => (row.file?.bytes ?? row.plan.file_bytes) / unit, ladder: true },
    speed: { title: "decode speed, tokens/s", of: (row) => row.result?.decode_tokens_per_s ?? NaN, ladder: false },
  };
  const limit = Number(/\bkl\s*<=?\s*([\d.e-]+)/i.exec(view.decision.bar)?.[1] ?? NaN);
  let across = "size";
  const plot = h("div");
  const draw = () => {
    const { title, of, ladder } = axes[across];
    const points = rows.map((row) => ({
      label: row.level,
      x: of(row),
      loss: row.fidelity.kl_mean,
      low: row.fidelity.kl_low,
      high: row.fidelity.kl_high,
      mark: TIERS[row.verdict.status] ?? "",
    }));
    const width = Math.min(1090, Math.max(340, holder.clientWidth - 32 || 760));
    refill(
      plot,
      lossChart(points, { title, width, limit: Number.isFinite(limit) ? limit : null, ladder }) ??
        h("p", { class: "soft" }, "Not measured."),
    );
  };
  const choice = (value, label) =>
    h(
      "label",
      { class: "check" },
      h("input", {
        type: "radio",
        name: "across",
        value,
        checked: value === across,
        onchange: () => ((across = value), draw()),
      }),
      label,
    );
  holder.append(
    h(
      "div",
      { class: "row", role: "radiogroup", "aria-label": "Loss against" },
      choice("size", "against size"),
      choice("speed", "against speed"),
    ),
    plot,
  );
  new ResizeObserver(draw).observe(holder);
  return holder;
}

function levelTable(run, view) {
  const columns = ["Level", "File", "Memory", "Tokens/s", "KL", "PPL ratio", "Top-1", "Passes", "Verdict"];
  const means = (name) => HEADS[name] ?? HEADS[name.toLowerCase()];
  const rows = view.plan.levels.map(({ level }) => levelRow(run, levelFacts(run, view, level)));
  const heads = columns.map((name) => h("th", { role: "columnheader", scope: "col", title: means(name) }, name));
  // The roles are those of the elements; a narrow page lays the table out as cards, which would drop them.
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": "Every level" },
    h(
      "table",
      { class: "levels", role: "table" },
      h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, ...heads)),
      ...rows,
    ),
  );
}

// Whether levels were run with several KV caches: rows of one file then differ in memory, not in size.
const overCaches = (view) => view.plan.levels.some(({ level }) => /\+(f32|f16|bf16|q\d_\d)(\/|$)/.test(level));
const context = (view) => view.plan.n_ctx.toLocaleString("en");

function frontView(view) {
  const { front } = view.decision;
  const what = overCaches(view) ? `memory at ${context(view)} tokens of context` : "size";
  return front.length
    ? [h("p", { class: "soft small" }, `No other level beats these in ${what}, speed and loss at once: ${front.join(", ")}.`)]
    : [];
}

function levelRow(run, row) {
  const { plan, fidelity, result, verdict } = row;
  const number = (kind, label, value, interval = "") =>
    h(
      "td",
      { role: "cell", "data-label": label },
      value === DASH
        ? DASH
        : h(
            "button",
            { type: "button", class: "number", onclick: () => showEvidence(run, row, kind) },
            value,
            interval && h("small", {}, interval),
          ),
    );
  const cells = [
    number("file", "File", bytes(row.file?.bytes ?? plan.file_bytes)),
    number("memory", "Memory", bytes(plan.total_bytes)),
    number("speed", "Tokens/s", small(result?.decode_tokens_per_s)),
    number("kl", "KL", small(fidelity?.kl_mean), range(fidelity?.kl_low, fidelity?.kl_high, small)),
    number("ppl", "PPL ratio", fixed(fidelity?.ppl_ratio, 3)),
    number("top1", "Top-1", percent(fidelity?.top1)),
    number(
      "passes",
      "Passes",
      result?.inputs ? `${result.passes}/${result.inputs}` : DASH,
      result && `${range(result.pass_low, result.pass_high, (share) => percent(share, 0))}`,
    ),
    h(
      "td",
      { role: "cell", class: "verdict" },
      h("strong", { title: VERDICTS[verdict.status] }, verdict.status),
      h("small", {}, LOSSES[verdict.loss] ?? ""),
    ),
  ];
  const kind = `${TIERS[verdict.status] ?? ""} ${verdict.status.replaceAll(" ", "-")}`.trim();
  return h(
    "tbody",
    { role: "rowgroup", class: kind },
    h("tr", { role: "row" }, h("th", { role: "rowheader", scope: "rowgroup" }, row.level), ...cells),
    h(
      "tr",
      { role: "row", class: "why" },
      h("td", { role: "cell", colspan: 9 }, verdict.reason[0].toUpperCase() + verdict.reason.slice(1)),
    ),
  );
}

function tagView(run) {
  const cells = run.decision.tags ?? [];
  if (!cells.length) return [];
  const levels = [...new Set(cells.map(({ level }) => level))];
  const tags = [...new Set(cells.map(({ tag }) => tag))];
  const cell = (tag, level) => {
    const found = cells.find((one) => one.tag === tag && one.level === level);
    if (!found) return h("td", {}, DASH);
    const said = `${found.status}: ${found.lost} lost, ${found.gained} gained of ${found.inputs}`;
    const shown = [
      found.lost > 0 && h("b", {}, `−${found.lost}`),
      found.gained > 0 && h("i", {}, ` +${found.gained}`),
    ].filter(Boolean);
    const open = () => showTagEvidence(run, found);
    const button = h(
      "button",
      { type: "button", class: "number", "aria-label": `${tag} at ${level}, ${said}`, onclick: open },
      ...(shown.length ? shown : ["="]),
    );
    return h("td", { class: found.status.replaceAll(" ", "-") }, button);
  };
  const inputs = (tag) => Math.max(...cells.filter((one) => one.tag === tag).map((one) => one.inputs));
  return [
    h(
      "section",
      { "aria-labelledby": "tags-title" },
      h("h2", { id: "tags-title" }, "Which work survives"),
      h(
        "p",
        { class: "soft" },
        "Inputs lost and gained against the source. A shaded loss is known: chance does not explain it.",
      ),
      h(
        "div",
        { class: "scroll", tabindex: 0, role: "region", "aria-label": "Which work survives" },
        h(
          "table",
          { class: "tags" },
          h("thead", {}, h("tr", {}, ...["Work", ...levels].map((name) => h("th", { scope: "col" }, name)))),
          h(
            "tbody",
            {},
            ...tags.map((tag) =>
              h(
                "tr",
                {},
                h("th", { scope: "row" }, tag, h("small", {}, ` ${inputs(tag)}`)),
                ...levels.map((level) => cell(tag, level)),
              ),
            ),
          ),
        ),
      ),
    ),
  ];
}
