// Past comparisons, kept in this browser only.

import { h } from "./dom.js";
import { ago } from "./format.js";
import { readRecord } from "./share.js";

const PLACE = "bitladder-comparisons";
const MOST = 50;

/** Everything kept, newest first; what cannot be read is as good as nothing. */
export function kept() {
  try {
    const list = JSON.parse(localStorage.getItem(PLACE) ?? "[]");
    return list.map(readRecord);
  } catch {
    return [];
  }
}

function store(list) {
  for (let most = MOST; most > 0; most = Math.floor(most / 2)) {
    try {
      localStorage.setItem(PLACE, JSON.stringify(list.slice(0, most)));
      return;
    } catch {
      // The browser's room is used up: keep fewer.
    }
  }
}

/** Add a comparison, or replace it after a vote. */
export function keep(record) {
  store([record, ...kept().filter((other) => other.at !== record.at)]);
}

const pairName = (record) =>
  record.answers
    .map((answer) => answer.level)
    .sort()
    .join(" / ");

/** How all blind votes on the same levels went. */
export function tally(record) {
  const votes = kept().filter((other) => other.vote && pairName(other) === pairName(record));
  const counts = record.answers.map(({ level }) => `${level} ${votes.filter(({ vote }) => vote === level).length}`);
  const same = votes.filter(({ vote }) => vote === "same").length;
  return `So far: ${counts.join(", ")}, equally good ${same}.`;
}

/** The list, with a button for each. */
export function historyView({ show, changed }) {
  const list = kept();
  const title = h("h2", { id: "past-title" }, "Past comparisons");
  if (!list.length) return [title, h("p", { class: "soft" }, "None yet. They stay in this browser.")];
  const forget = () => {
    localStorage.removeItem(PLACE);
    changed();
  };
  const items = list.map((record) =>
    h(
      "li",
      {},
      h(
        "button",
        { type: "button", class: "link", onclick: () => show(record) },
        record.prompt.slice(0, 90) || "(empty prompt)",
      ),
      h(
        "span",
        { class: "soft small" },
        ` ${record.blind && !record.vote ? "not voted" : pairName(record)} · ${ago(record.at)}`,
      ),
    ),
  );
  return [
    title,
    h("ul", { class: "plain" }, ...items),
    h("p", {}, h("button", { type: "button", class: "quiet", onclick: forget }, "Forget all")),
  ];
}
