// The first token where two answers part, with both probabilities.

import { h } from "./dom.js";
import { DASH, percent } from "./format.js";

const shown = (token) =>
  token === null ? "(end)" : JSON.stringify(token).slice(1, -1).replace(/^ /, "␣") || "(empty)";

const SAID = {
  "tie-break": "A tie-break: both levels held both tokens nearly equally likely, so rounding alone can turn it.",
  diverged: "A real difference: at least one level was sure of its token.",
  ended: "One answer ended where the other went on.",
};

/** A card for one pair of answers. */
export function partingView(oneName, otherName, one, other) {
  const title = h("h3", {}, `${oneName} and ${otherName}`);
  if (one.error || other.error)
    return h("article", { class: "card" }, title, h("p", {}, "One of them did not finish."));
  if (!other.parting) {
    const same = one.text === other.text;
    const said = same
      ? "The same answer, word for word."
      : "The engine gave no token probabilities, so the place is not known.";
    return h("article", { class: "card" }, title, h("p", {}, said));
  }
  const { at, tokens, chances, kind } = other.parting;
  const rows = [oneName, otherName].map((name, n) => {
    const [own, others] = chances?.[n] ?? [null, null];
    const pair = n === 0 ? [own, others] : [others, own];
    return h(
      "tr",
      {},
      h("th", { scope: "row" }, name),
      ...pair.map((chance) => h("td", {}, chance === null ? DASH : percent(chance))),
    );
  });
  return h(
    "article",
    { class: `card ${kind}` },
    title,
    h("p", {}, `They part at token ${at + 1}. ${SAID[kind]}`),
    chances &&
      h(
        "table",
        { class: "chances" },
        h("caption", { class: "visually-hidden" }, "Probability that each level gave to each token"),
        h(
          "thead",
          {},
          h("tr", {}, h("td", {}), ...tokens.map((token) => h("th", { scope: "col" }, h("code", {}, shown(token))))),
        ),
        h("tbody", {}, ...rows),
      ),
  );
}
