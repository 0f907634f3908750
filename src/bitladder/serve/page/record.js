// A finished comparison: answers with their differences, the vote, where they part, and how to share it.

import { Column } from "./column.js";
import { h, refill, saveJson } from "./dom.js";
import { keep, tally } from "./history.js";
import { partingView } from "./parting.js";
import { toLink } from "./share.js";

/** What an answer is called until the vote is cast. */
export const blindName = (n) => `Answer ${"ABCDEFGH"[n]}`;

/** A finished comparison: from just now, from the history, a link or a file. */
export function showRecord(results, record, refresh) {
  const hidden = record.blind && !record.vote;
  const columns = record.answers.map((answer, n) => new Column(hidden ? blindName(n) : answer.level, answer));
  columns.forEach((column, n) => {
    column.show(n ? record.answers[0] : null);
    if (!hidden) column.reveal();
  });
  const names = record.answers.map((answer, n) => (hidden ? blindName(n) : answer.level));
  const parted = record.answers
    .slice(1)
    .map((answer, n) => partingView(names[0], names[n + 1], record.answers[0], answer));
  refill(
    results,
    h("div", { class: "columns" }, ...columns.map((column) => column.element)),
    ...(record.blind
      ? [voteView(record, names, () => (keep(record), showRecord(results, record, refresh), refresh()))]
      : []),
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
      refill(said, "Copy this: ", h("a", { href: link }, "link"));
    }
  };
  return h(
    "p",
    { class: "actions" },
    h("button", { type: "button", class: "quiet", onclick: copy }, "Copy a link"),
    h(
      "button",
      { type: "button", class: "quiet", onclick: () => saveJson("comparison.json", record) },
      "Save as a file",
    ),
    said,
  );
}
