// One level's answer while it streams, and afterwards with its differences marked.

import { wordDiff } from "./diff.js";
import { h, refill } from "./dom.js";
import { fixed, seconds } from "./format.js";

const PAINT_EVERY_MS = 200; // readable, and far cheaper than painting every token
const unpainted = new Set();
let timer = 0;

/** All columns that wait, in one frame. */
function paint() {
  timer = 0;
  for (const column of unpainted) column.paint();
  unpainted.clear();
}

/** A column. `name` is what is shown before a blind vote, `level` after. */
export class Column {
  constructor(name, answer) {
    this.answer = answer;
    this.title = h("h3", {}, name);
    this.role = h("span", { class: "soft small" });
    this.text = h("p", { class: "text", lang: "" });
    this.numbers = h("p", { class: "numbers soft small" });
    this.element = h("article", { class: "answer" }, h("header", {}, this.title, this.role), this.text, this.numbers);
    this.live = document.createTextNode("");
    this.waiting = "";
  }

  /** More text; painted a few times a second. */
  add(text) {
    this.answer.text += text;
    this.waiting += text;
    unpainted.add(this);
    timer ||= setTimeout(paint, PAINT_EVERY_MS);
  }

  /** Show what has come since the last time. */
  paint() {
    if (this.live.parentNode !== this.text) refill(this.text, this.live);
    this.live.appendData(this.waiting);
    this.waiting = "";
  }

  /** The whole answer, differences from `base` marked. */
  show(base) {
    unpainted.delete(this);
    const marks = { same: (text) => text, added: (text) => h("ins", {}, text), removed: (text) => h("del", {}, text) };
    const { answer } = this;
    const segments = base ? wordDiff(base.text, answer.text) : [{ kind: "same", text: answer.text }];
    refill(this.text, ...segments.map(({ kind, text }) => marks[kind](text)));
    if (answer.error)
      this.text.append(h("span", { class: "bad", role: "alert" }, `${answer.text ? " " : ""}${answer.error}`));
    else if (!answer.text) this.text.append(h("span", { class: "soft" }, "(no text)"));
  }

  /** Speed and identity: after a vote, or at once when nothing is blind. */
  reveal() {
    const { answer } = this;
    this.title.textContent = answer.level;
    this.role.textContent = answer.tier ? `${answer.tier} tier` : "";
    this.element.classList.add(answer.tier ?? "other");
    if (answer.error) return;
    const rate = answer.count > 1 ? (answer.count - 1) / (answer.seconds - answer.first) : NaN;
    const parts = [`${fixed(rate, 1)} tokens/s`, `first token ${seconds(answer.first)}`, `${answer.count} tokens`];
    if (answer.finish === "length") parts.push("cut at the limit");
    this.numbers.textContent = parts.join(" · ");
  }
}
