// The prompt, the levels to ask, and how.

import { h } from "./dom.js";

const check = (input, ...said) => h("label", { class: "check" }, input, ...said);
const labelled = (text, input) => h("label", {}, `${text} `, input);

/** A form over `levels` ({level, tier}); the first two are chosen. */
export class CompareForm {
  constructor(levels) {
    this.levels = levels;
    this.prompt = h("textarea", { id: "prompt", rows: 4, required: true });
    this.prompt.placeholder = "A prompt like those that your deployment will get.";
    this.system = h("textarea", { id: "system", rows: 2 });
    this.tokens = h("input", { type: "number", id: "tokens", min: 1, max: 8192, value: 256 });
    this.temperature = h("input", { type: "number", id: "temperature", min: 0, max: 2, step: 0.1, value: 0 });
    this.blind = h("input", { type: "checkbox", id: "blind" });
    this.turns = h("input", { type: "checkbox", id: "turns" });
    this.complaint = h("p", { class: "bad small", role: "alert" });
    this.go = h("button", { class: "primary", type: "submit" }, "Compare");
    this.element = this.layout();
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.element.requestSubmit();
    });
  }

  layout() {
    const box = ({ level, tier }, place) => {
      const input = h("input", { type: "checkbox", name: "level", value: level, checked: place < 2 });
      return check(input, level, h("span", { class: "soft small" }, tier));
    };
    return h(
      "form",
      { class: "card", "aria-label": "A prompt to compare" },
      h("label", { for: "prompt" }, "Prompt"),
      this.prompt,
      h("fieldset", {}, h("legend", {}, "Levels"), ...this.levels.map(box)),
      h(
        "details",
        {},
        h("summary", {}, "Settings"),
        h("label", { for: "system" }, "System message"),
        this.system,
        h("div", { class: "row" }, labelled("Most tokens", this.tokens), labelled("Temperature", this.temperature)),
        check(this.turns, "One after the other, so that speeds do not disturb each other"),
      ),
      check(this.blind, "Blind: hide which level is which until I have voted"),
      this.complaint,
      h("p", { class: "actions" }, this.go, h("span", { class: "soft small" }, "Ctrl + Enter")),
    );
  }

  /** What is asked, or null with a complaint shown. */
  read() {
    const chosen = [...this.element.querySelectorAll("[name=level]:checked")].map((input) => input.value);
    this.complaint.textContent = chosen.length < 2 ? "Choose at least two levels." : "";
    if (chosen.length < 2) return null;
    const settings = {
      max_tokens: Number(this.tokens.value) || 256,
      temperature: Number(this.temperature.value) || 0,
      turns: this.turns.checked,
    };
    const levels = this.levels.filter(({ level }) => chosen.includes(level));
    return { prompt: this.prompt.value, system: this.system.value, settings, blind: this.blind.checked, levels };
  }

  /** As it was asked in a finished comparison. */
  fill({ prompt, system, settings }) {
    this.prompt.value = prompt;
    this.system.value = system;
    this.tokens.value = settings.max_tokens;
    this.temperature.value = settings.temperature;
  }

  /** While answers arrive the button stops them. */
  running(on) {
    this.go.textContent = on ? "Stop" : "Compare";
    this.go.classList.toggle("primary", !on);
  }
}
