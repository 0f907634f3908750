// One prompt, two or more levels, side by side.

import { getJson, streamChat } from "./api.js";
import { Column } from "./column.js";
import { parting } from "./diff.js";
import { announce, h, refill } from "./dom.js";
import { CompareForm } from "./form.js";
import { historyView, keep } from "./history.js";
import { blindName, showRecord } from "./record.js";
import { readLink, readRecord } from "./share.js";

let stop = null; // aborts what is streaming

export async function showCompare(panel) {
  const levels = await servedLevels();
  const form = new CompareForm(levels);
  const results = h("div", { class: "results" });
  const past = h("section", { class: "past", "aria-labelledby": "past-title" });
  const refresh = () => refill(past, ...historyView({ show: (record) => replay(record), changed: refresh }));
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
  const opener = h("input", {
    type: "file",
    accept: ".json,application/json",
    class: "visually-hidden",
    id: "open-file",
  });
  opener.addEventListener("change", async () => {
    try {
      replay(readRecord(JSON.parse(await opener.files[0].text())));
    } catch (error) {
      refill(
        results,
        h("p", { class: "note bad", role: "alert" }, `This file is no comparison: ${error.message}`),
      );
    }
    opener.value = "";
  });
  form.element
    .querySelector(".actions")
    .append(h("label", { for: "open-file", class: "button quiet" }, "Open a saved one"), opener);
  refill(panel, h("h2", { class: "visually-hidden" }, "Compare"), form.element, results, past);
  refresh();
  const follow = async () => {
    try {
      const shared = await readLink(location.hash);
      if (shared) replay(shared);
    } catch (error) {
      refill(
        results,
        h("p", { class: "note bad", role: "alert" }, `The link holds no comparison: ${error.message}`),
      );
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
    if (bitladder && !levels.has(bitladder.level))
      levels.set(bitladder.level, { level: bitladder.level, tier: bitladder.tier });
  }
  return [...levels.values()];
}

/** Ask every level, stream, then mark the differences and keep the record. */
async function compare(results, asked, form, refresh) {
  const levels = asked.blind ? shuffled(asked.levels) : asked.levels;
  const record = { version: 1, at: Date.now() / 1000, ...asked, levels: undefined, vote: null };
  record.answers = levels.map(({ level, tier }) => ({
    level,
    tier,
    text: "",
    count: 0,
    first: null,
    seconds: 0,
    finish: null,
    error: "",
    parting: null,
  }));
  const columns = record.answers.map((answer, n) => new Column(asked.blind ? blindName(n) : answer.level, answer));
  refill(results, h("div", { class: "columns" }, ...columns.map((column) => column.element)));
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
  });
  announce("All answers are complete.");
  keep(record);
  showRecord(results, record, refresh);
  refresh();
}

async function stream({ prompt, system, settings }, column, trace, signal) {
  const { answer } = column;
  const messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: prompt }];
  const body = {
    model: answer.level,
    messages,
    max_tokens: settings.max_tokens,
    temperature: settings.temperature,
    seed: 1,
  };
  column.element.setAttribute("aria-busy", "true");
  try {
    const told = await streamChat(body, {
      onText: (text) => column.add(text),
      onToken: (token) => trace.push(token),
      signal,
    });
    Object.assign(answer, { count: told.tokens, first: told.first, seconds: told.seconds, finish: told.finish });
  } catch (error) {
    answer.error = error.name === "AbortError" ? "Stopped." : error.message;
  }
  column.element.removeAttribute("aria-busy");
  column.show(null);
}

function shuffled(list) {
  const copy = [...list];
  for (let n = copy.length - 1; n > 0; n -= 1) {
    const other = Math.floor(Math.random() * (n + 1));
    [copy[n], copy[other]] = [copy[other], copy[n]];
  }
  return copy;
}
