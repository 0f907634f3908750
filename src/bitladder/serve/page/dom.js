// Elements from plain calls. Text is always set as text: nothing that a model or a prompt says becomes markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...shown(children));
  return element;
}

/** Children without those that a condition left out, which would show as "false" or "0". Numbers are given as text. */
const shown = (children) =>
  children.flat().filter((child) => child !== null && child !== undefined && child !== false && child !== 0);

/** Put these children in the place of all others; those that a condition left out are no text. */
export function refill(element, ...children) {
  element.replaceChildren(...shown(children));
}

/** An HTML element: `h("p", {class: "soft"}, "text", child)`. Attributes named `onclick` take functions. */
export const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);

/** An SVG element. */
export const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

/** Say something to screen readers. */
export function announce(text) {
  document.getElementById("status").textContent = text;
}

/** Let the browser save `data` as a JSON file. */
export function saveJson(name, data) {
  const address = URL.createObjectURL(new Blob([JSON.stringify(data, null, 2)], { type: "application/json" }));
  h("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

/** A button that copies `text`, and says so. */
export function copyButton(text) {
  const button = h("button", { type: "button", class: "quiet", onclick: copy }, "Copy");
  async function copy() {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Copying is not allowed here";
    }
    announce(button.textContent);
    setTimeout(() => (button.textContent = "Copy"), 2000);
  }
  return button;
}
