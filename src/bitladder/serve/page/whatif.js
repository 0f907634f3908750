// What if the machine, the context or the bar were another? The gateway decides again with the program's own policy.

import { getJson } from "./api.js";
import { h } from "./dom.js";
import { bytes } from "./format.js";

const STEPS = 100;
const CONTEXTS = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]; // for records that list none
const WAIT_MS = 150;
const KL = /\bkl\s*<=?\s*([\d.]+(?:e-?\d+)?)/i; // the limit in a bar that has one
const [FINEST, COARSEST] = [0.0001, 2];

/** A form that calls `changed(view, true)` with `{plan, decision}`, or `changed(null, true)` for the run itself. */
export function whatIfForm(run, changed) {
  const totals = run.plan.levels.map((level) => level.total_bytes);
  const [least, most] = [Math.min(...totals) * 0.6, Math.max(...totals, run.plan.budget_bytes) * 2.2];
  const toBytes = (step) => Math.round(least * (most / least) ** (step / STEPS));
  const toStep = (size) => Math.round((STEPS * Math.log(size / least)) / Math.log(most / least));
  const listed = run.plan.contexts?.length ? run.plan.contexts.map(({ n_ctx }) => n_ctx) : CONTEXTS;
  const contexts = [...new Set([...listed, run.plan.n_ctx])].sort((a, b) => a - b);
  const memory = h("input", { type: "range", id: "if-memory", min: 0, max: STEPS });
  const context = h("input", { type: "range", id: "if-context", min: 0, max: contexts.length - 1 });
  const toLimit = (step) => Number((FINEST * (COARSEST / FINEST) ** (step / STEPS)).toPrecision(2));
  const ofLimit = (kl) => Math.round((STEPS * Math.log(kl / FINEST)) / Math.log(COARSEST / FINEST));
  const limit = h("input", { type: "range", id: "if-limit", min: 0, max: STEPS });
  const bar = h("input", { type: "text", id: "if-bar", spellcheck: "false", autocomplete: "off" });
  const memorySaid = h("output", { for: "if-memory" });
  const contextSaid = h("output", { for: "if-context" });
  const limitSaid = h("output", { for: "if-limit" });
  const complaint = h("p", { class: "bad small", role: "alert" });
  let touched = { memory: false };
  let timer = 0;
  let asked = 0;

  const label = () => {
    const size = touched.memory ? toBytes(Number(memory.value)) : run.plan.budget_bytes;
    memorySaid.textContent = bytes(size);
    memory.setAttribute("aria-valuetext", bytes(size));
    contextSaid.textContent = `${contexts[context.value].toLocaleString("en")} tokens`;
    context.setAttribute("aria-valuetext", contextSaid.textContent);
    const kl = KL.exec(bar.value);
    limit.disabled = !kl;
    limitSaid.textContent = kl ? `${kl[1]} nats per token` : "not in the bar";
    limit.setAttribute("aria-valuetext", limitSaid.textContent);
    return size;
  };
  const followBar = () => {
    const kl = KL.exec(bar.value);
    if (kl) limit.value = ofLimit(Number(kl[1]) || FINEST);
  };
  const reset = () => {
    touched = { memory: false };
    memory.value = toStep(run.plan.budget_bytes);
    context.value = contexts.indexOf(run.plan.n_ctx);
    bar.value = run.decision.bar;
    followBar();
    complaint.textContent = "";
    label();
  };
  const ask = async () => {
    const mine = ++asked;
    const query = new URLSearchParams({ memory: label(), ctx: contexts[context.value], bar: bar.value });
    try {
      const view = await getJson(`/bitladder/api/what-if?${query}`);
      if (mine !== asked) return; // a later question is under way
      complaint.textContent = "";
      changed(view, true);
    } catch (error) {
      if (mine === asked) complaint.textContent = error.message;
    }
  };
  const later = () => {
    label();
    clearTimeout(timer);
    timer = setTimeout(ask, WAIT_MS);
  };
  memory.addEventListener("input", () => {
    touched.memory = true;
    later();
  });
  context.addEventListener("input", later);
  limit.addEventListener("input", () => {
    bar.value = bar.value.replace(KL, `kl < ${toLimit(Number(limit.value))}`);
    later();
  });
  bar.addEventListener("input", () => {
    followBar();
    later();
  });
  const again = () => {
    clearTimeout(timer);
    asked += 1;
    reset();
    changed(null, true);
  };
  reset();
  return h(
    "form",
    { class: "card whatif", "aria-label": "What if", onsubmit: (event) => (event.preventDefault(), ask()) },
    h("h2", {}, "What if"),
    h("div", { class: "dial" }, h("label", { for: "if-memory" }, "Memory"), memory, memorySaid),
    h("div", { class: "dial" }, h("label", { for: "if-context" }, "Context"), context, contextSaid),
    h("div", { class: "dial" }, h("label", { for: "if-limit" }, "KL limit"), limit, limitSaid),
    h(
      "div",
      { class: "dial" },
      h("label", { for: "if-bar" }, "Bar"),
      bar,
      h("button", { type: "button", class: "quiet", onclick: again }, "As measured"),
    ),
    complaint,
  );
}
