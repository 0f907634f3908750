// One prompt, two or more levels, side by side.

import { getJson, streamChat } from "./api.js";
import { Column } from "./column.js";
import { parting } from "./diff.js";
import { announce, h, saveJson } from "./dom.js";
import { historyView, keep, tally } from "./history.js";
import { partingView } from "./parting.js";
import { readLink, readRecord, toLink } from "./share.js";

const LETTERS = "ABCDEFGH";
let stop = null; // aborts what is streaming

export async function showCompare(panel) {
  const levels = await servedLevels();
  const form = compareForm(levels);
  const results = h("div", { class: "results" });
  const past = h("section", { class: "past", "aria-labelledby": "past-title" });
  const refresh = () => past.replaceChildren(...historyView({ show: (record) => replay(record), changed: refresh }));
  const replay = (record) => {
    form.fill(record);
    showRecord(results, record, refresh);
    results.scrollIntoView({ block: "nearest" });
  };
  form.element.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (stop) return stop.abort();
    const asked = form.read();
    if (asked) await compare(results, asked, form, refresh);
  });
  const opener = h("input", { type: "file", accept: ".json,application/json", class: "visually-hidden", id: "open-file" });
  opener.addEventListener("change", async () => {
    try {
      replay(readRecord(JSON.parse(await opener.files[0].text())));
    } catch (error) {
      results.replaceChildren(h("p", { class: "note bad", role: "alert" }, `This file is no comparison: ${error.message}`));
    }
    opener.value = "";
  });
  form.element.querySelector(".actions").append(h("label", { for: "open-file", class: "button quiet" }, "Open a saved one"), opener);
  panel.replaceChildren(h("h2", { class: "visually-hidden" }, "Compare"), form.element, results, past);
  refresh();
  const follow = async () => {
    try {
      const shared = await readLink(location.hash);
      if (shared) replay(shared);
    } catch (error) {
      results.replaceChildren(h("p", { class: "note bad", role: "alert" }, `The link holds no comparison: ${error.message}`));
    }
  };
  addEventListener("hashchange", follow);
  await follow();
}

/** Levels behind this gateway: `{level, tier}`, each once. */
async function servedLevels() {
  const { data } = await getJson("/v1/models");
  const levels = new Map();
  for (const { bitladder } of data) {
    if (bitladder && !levels.has(bitladder.level)) levels.set(bitladder.level, { level: bitladder.level, tier: bitladder.tier });
  }
  return [...levels.values()];
}

function compareForm(levels) {
  const prompt = h("textarea", { id: "prompt", rows: 4, required: true, placeholder: "Ask something that your deployment will be asked." });
  const system = h("textarea", { id: "system", rows: 2 });
  const tokens = h("input", { id: "tokens", type: "number", min: 1, max: 8192, value: 256 });
  const temperature = h("input", { id: "temperature", type: "number", min: 0, max: 2, step: 0.1, value: 0 });
  const blind = h("input", { id: "blind", type: "checkbox" });
  const turns = h("input", { id: "turns", type: "checkbox" });
  const boxes = levels.map(({ level, tier }, place) =>
    h("label", { class: "check" }, h("input", { type: "checkbox", name: "level", value: level, checked: place < 2 }), level, h("span", { class: "soft small" }, tier)),
  );
  const complaint = h("p", { class: "bad small", role: "alert" });
  const go = h("button", { class: "primary", type: "submit" }, "Compare");
  const element = h(
    "form",
    { class: "card", "aria-label": "A prompt to compare" },
    h("label", { for: "prompt" }, "Prompt"),
    prompt,
    h("fieldset", {}, h("legend", {}, "Levels"), ...boxes),
    h(
      "details",
      {},
      h("summary", {}, "Settings"),
      h("label", { for: "system" }, "System message"),
      system,
      h("div", { class: "row" }, h("label", {}, "Most tokens ", tokens), h("label", {}, "Temperature ", temperature)),
      h("label", { class: "check" }, turns, "One after the other, so that speeds do not disturb each other"),
    ),
    h("label", { class: "check" }, blind, "Blind: hide which level is which until I have voted"),
    complaint,
    h("p", { class: "actions" }, go, h("span", { class: "soft small" }, "Ctrl + Enter")),
  );
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element.requestSubmit();
  });
  const read = () => {
    const chosen = [...element.querySelectorAll("[name=level]:checked")].map((box) => box.value);
    complaint.textContent = chosen.length < 2 ? "Choose at least two levels." : "";
    if (chosen.length < 2) return null;
    return {
      prompt: prompt.value,
      system: system.value,
      settings: { max_tokens: Number(tokens.value) || 256, temperature: Number(temperature.value) || 0, turns: turns.checked },
      blind: blind.checked,
      levels: levels.filter(({ level }) => chosen.includes(level)),
    };
  };
  const fill = (record) => {
    prompt.value = record.prompt;
    system.value = record.system;
    tokens.value = record.settings.max_tokens;
    temperature.value = record.settings.temperature;
  };
  const running = (on) => {
    go.textContent = on ? "Stop" : "Compare";
    go.classList.toggle("primary", !on);
  };
  return { element, read, fill, running };
}

/** Ask every level, stream, then mark the differences and keep the record. */
async function compare(results, asked, form, refresh) {
  const levels = asked.blind ? shuffled(asked.levels) : asked.levels;
  const record = { version: 1, at: Date.now() / 1000, ...asked, levels: undefined, vote: null };
  record.answers = levels.map(({ level, tier }) => ({ level, tier, text: "", count: 0, first: null, seconds: 0, finish: null, error: "", parting: null }));
  const columns = record.answers.map((answer, n) => new Column(asked.blind ? `Answer ${LETTERS[n]}` : answer.level, answer));
  results.replaceChildren(h("div", { class: "columns" }, ...columns.map((column) => column.element)));
  stop = new AbortController();
  form.running(true);
  announce("Answers are arriving.");
  const traces = record.answers.map(() => []);
  const ask = (n) => stream(asked, columns[n], traces[n], stop.signal);
  const each = record.answers.map((_, n) => n);
  if (asked.settings.turns) for (const n of each) await ask(n);
  else await Promise.all(each.map(ask));
  stop = null;
  form.running(false);
  record.answers.forEach((answer, n) => {
    const comparable = n > 0 && traces[0].length && traces[n].length && !answer.error && !record.answers[0].error;
    answer.parting = comparable ? parting(traces[0], traces[n]) : null;
    answer.traced = traces[n].length > 0;
  });
  announce("All answers are complete.");
  keep(record);
  showRecord(results, record, refresh);
  refresh();
}

async function stream({ prompt, system, settings }, column, trace, signal) {
  const { answer } = column;
  const messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: prompt }];
  const body = { model: answer.level, messages, max_tokens: settings.max_tokens, temperature: settings.temperature, seed: 1 };
  column.element.setAttribute("aria-busy", "true");
  try {
    const told = await streamChat(body, { onText: (text) => column.add(text), onToken: (token) => trace.push(token), signal });
    Object.assign(answer, { count: told.tokens, first: told.first, seconds: told.seconds, finish: told.finish });
  } catch (error) {
    answer.error = error.name === "AbortError" ? "Stopped." : error.message;
  }
  column.element.removeAttribute("aria-busy");
  column.show(null);
}

/** A finished comparison: from just now, from the history, a link or a file. */
function showRecord(results, record, refresh) {
  const hidden = record.blind && !record.vote;
  const columns = record.answers.map((answer, n) => new Column(hidden ? `Answer ${LETTERS[n]}` : answer.level, answer));
  columns.forEach((column, n) => {
    column.show(n ? record.answers[0] : null);
    if (!hidden) column.reveal();
  });
  const names = record.answers.map((answer, n) => (hidden ? `Answer ${LETTERS[n]}` : answer.level));
  const parted = record.answers.slice(1).map((answer, n) => partingView(names[0], names[n + 1], record.answers[0], answer));
  results.replaceChildren(
    h("div", { class: "columns" }, ...columns.map((column) => column.element)),
    ...(record.blind ? [voteView(record, names, () => (keep(record), showRecord(results, record, refresh), refresh()))] : []),
    h("section", { class: "parted", "aria-label": "Where the answers part" }, ...parted),
    shareView(record),
  );
}

function voteView(record, names, voted) {
  if (record.vote) {
    const said = record.vote === "same" ? "You found them equally good." : `You preferred ${record.vote}.`;
    return h("p", { class: "note", role: "status" }, `${said} ${tally(record)}`);
  }
  const choose = (vote) => () => {
    record.vote = vote;
    voted();
  };
  return h(
    "div",
    { class: "vote", role: "group", "aria-label": "Your vote" },
    h("p", {}, "Which is better?"),
    ...record.answers.map((answer, n) => h("button", { type: "button", onclick: choose(answer.level) }, names[n])),
    h("button", { type: "button", onclick: choose("same") }, "Equally good"),
  );
}

function shareView(record) {
  const said = h("span", { class: "soft small", role: "status" });
  const copy = async () => {
    const link = await toLink(record);
    try {
      await navigator.clipboard.writeText(link);
      said.textContent = "Copied. It holds the prompt and the answers, and nothing is stored on a server.";
    } catch {
      said.replaceChildren("Copy this: ", h("a", { href: link }, "link"));
    }
  };
  return h(
    "p",
    { class: "actions" },
    h("button", { type: "button", class: "quiet", onclick: copy }, "Copy a link"),
    h("button", { type: "button", class: "quiet", onclick: () => saveJson("comparison.json", record) }, "Save as a file"),
    said,
  );
}

function shuffled(list) {
  const copy = [...list];
  for (let n = copy.length - 1; n > 0; n -= 1) {
    const other = Math.floor(Math.random() * (n + 1));
    [copy[n], copy[other]] = [copy[other], copy[n]];
  }
  return copy;
}
