// Tabs, and what each one shows. The address says which tab is open: #compare, #ladder, #live.

import { getJson } from "./api.js";
import { h, refill } from "./dom.js";

const TABS = ["compare", "ladder", "live"];
const started = {};
const start = {
  compare: async (panel) => (await import("./compare.js")).showCompare(panel),
  ladder: async (panel) => (await import("./ladder.js")).showLadder(panel),
  live: async (panel) => (await import("./live.js")).showLive(panel),
};

function open(name, { focus = false } = {}) {
  for (const each of TABS) {
    const tab = document.getElementById(`tab-${each}`);
    const chosen = each === name;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    document.getElementById(each).hidden = !chosen;
    if (chosen && focus) tab.focus();
  }
  document.title = `${name[0].toUpperCase()}${name.slice(1)} · Bitladder`;
  started[name] ??= start[name](document.getElementById(name)).catch((error) => {
    refill(document.getElementById(name), h("p", { class: "note bad", role: "alert" }, error.message));
    delete started[name];
  });
}

const wanted = () => TABS.find((name) => location.hash.startsWith(`#${name}`)) ?? "compare";

function choose(name, options) {
  if (wanted() !== name) history.replaceState(null, "", `#${name}`);
  open(name, options);
}

for (const [place, name] of TABS.entries()) {
  const tab = document.getElementById(`tab-${name}`);
  tab.addEventListener("click", () => choose(name));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const to =
      event.key === "Home"
        ? 0
        : event.key === "End"
          ? TABS.length - 1
          : step && (place + step + TABS.length) % TABS.length;
    if (to === undefined) return;
    event.preventDefault();
    choose(TABS[to], { focus: true });
  });
}
addEventListener("hashchange", () => open(wanted()));

const live = await getJson("/bitladder/api/live").catch(() => null);
// A page without a gateway behind it (`bitladder page REPORT`) has nothing to compare or watch.
const served = live !== null;
for (const name of ["compare", "live"]) document.getElementById(`tab-${name}`).hidden = !served;
if (live?.name) document.getElementById("model-name").textContent = live.name;
if (served) open(wanted());
else choose("ladder");
