// Loss against size or speed: log scale for KL, intervals as bars, the chosen pair marked, the cliff named.
// The report's chart.py draws the same, name by name in the same places.

import { s } from "./dom.js";
import { small } from "./format.js";
import { BESIDE, BOLD, CHARACTER, firstFree, LINE, placeOf, placesAround } from "./placement.js";

const FRAME = { left: 50, right: 18, top: 22, bottom: 44 };
const FLOOR = 1e-5; // nats; on a log scale zero is infinitely far down
const TICK_ROOM = 48;
const MATTERS = 0.02; // nats; growing from nothing to next to nothing is no cliff

/**
 * An SVG of `points` ({label, x, loss, low, high, mark}); `ladder` when levels follow one another along the axis, so
 * that a line joins them and there may be a cliff. Null when nothing was measured.
 */
export function lossChart(points, { title, width, limit = null, ladder = true }) {
  const known = points.filter((p) => Number.isFinite(p.loss) && Number.isFinite(p.x)).sort((a, b) => a.x - b.x);
  if (!known.length) return null;
  const height = 380;
  const scale = scales(known, { limit, width, height, ladder });
  const cliff = ladder ? findCliff(known) : null;
  const right = width - FRAME.right;
  const bottom = height - FRAME.bottom;
  const area = [FRAME.left, FRAME.top - 4, width, bottom];
  const taken = known.flatMap((p) => covered(p, scale));
  if (scale.limit) taken.push([FRAME.left, scale.y(limit) - 2, right, scale.y(limit) + 2]);
  const text = (kind, x, y, said, anchor = "start") => s("text", { class: kind, x, y, "text-anchor": anchor }, said);
  return s(
    "svg",
    { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": described(known, title, cliff) },
    text("title", 2, 11, "mean KL, nats per token (log scale)"),
    ...logTicks(...scale.range).flatMap((value) => [
      s("line", { class: "grid", x1: FRAME.left, x2: right, y1: scale.y(value), y2: scale.y(value) }),
      text("tick", FRAME.left - 8, scale.y(value) + 4, shortly(value), "end"),
    ]),
    ...apart(linearTicks(...scale.span, Math.max(4, Math.floor(width / 90))), scale.x).map((value) =>
      text("tick", scale.x(value), bottom + 18, value.toLocaleString("en"), "middle"),
    ),
    s("line", { class: "axis", x1: FRAME.left, x2: right, y1: bottom, y2: bottom }),
    text("title", (FRAME.left + right) / 2, height - 6, title, "middle"),
    ...(scale.limit
      ? [s("line", { class: "limit", x1: FRAME.left, x2: right, y1: scale.y(limit), y2: scale.y(limit) }), limitLabel()]
      : []),
    ...(cliff ? cliffBand(cliff) : []),
    ladder &&
      known.length > 1 &&
      s("polyline", { class: "curve", points: known.map((p) => `${scale.x(p.x)},${scale.y(p.loss)}`).join(" ") }),
    ...known.map((p) => whisker(p, scale)),
    ...known.map((p) => dot(p, scale)),
    ...labels(known),
  );

  /** On the line where it is free, first at the end where few levels are. */
  function limitLabel() {
    const said = `bar: ${limit}`;
    const wide = said.length * CHARACTER;
    const steps = Array.from({ length: Math.floor((right - FRAME.left - wide) / 40) + 1 }, (_, step) => 40 * step);
    const places = [-6, 15, -20, 29, -34, 43].flatMap((dy) =>
      steps.map((step) =>
        ladder
          ? placeOf(right - step, scale.y(limit) + dy, "end", wide)
          : placeOf(FRAME.left + step, scale.y(limit) + dy, "start", wide),
      ),
    );
    return placed("limit-label", said, firstFree(places, taken, area));
  }

  function cliffBand({ above, below, times }) {
    const [from, to] = [scale.x(below.x), scale.x(above.x)];
    const said = `the cliff: ×${times.toFixed(1)}`;
    const wide = said.length * CHARACTER;
    const rows = Math.floor((bottom - FRAME.top) / 16);
    const heights = Array.from({ length: rows }, (_, row) => FRAME.top + 12 + 16 * row);
    const places = heights.flatMap((y) => [
      placeOf(to + 6, y, "start", wide),
      placeOf(from - 6, y, "end", wide),
      placeOf((from + to) / 2, y, "middle", wide),
    ]);
    return [
      s("rect", { class: "cliff", x: from, y: FRAME.top, width: to - from, height: bottom - FRAME.top }),
      placed("cliff-label", said, firstFree(places, taken, area)),
    ];
  }

  /**
   * Names beside the dots, the chosen levels' first; one that stands further off is joined to its dot by a line. A name
   * that finds no free place is left out; the table below has it, and so has the dot's own title.
   */
  function labels(points) {
    return [...points]
      .sort((a, b) => Boolean(b.mark) - Boolean(a.mark))
      .flatMap((p) => {
        const said = p.mark ? `${p.label} · ${p.mark === "both" ? "both tiers" : p.mark}` : p.label;
        const [x, y] = [scale.x(p.x), scale.y(p.loss)];
        const place = firstFree(placesAround(x, y, said.length * (p.mark ? BOLD : CHARACTER)), taken, area);
        if (!p.mark && !place.free) return [];
        return [leader(x, y, place), placed(`label ${p.mark}`, said, place)];
      });
  }

  function placed(kind, said, place) {
    taken.push(place.box);
    return text(kind, place.x, place.y, said, place.anchor);
  }
}

/** A line from a dot to a name that does not touch it. */
function leader(x, y, place) {
  const rise = place.y - 4 - y;
  if (Math.abs(rise) < LINE + 1 && Math.abs(place.x - x) < BESIDE + 1) return null;
  const end = rise < 0 ? place.box[3] - 1 : rise > 0 ? place.box[1] + 1 : y;
  return s("line", { class: "leader", x1: x, y1: y + 8 * Math.sign(rise), x2: place.x, y2: end });
}

/** The boxes of a level's mark and of its interval. */
function covered(p, scale) {
  const [x, y] = [scale.x(p.x), scale.y(p.loss)];
  const around = p.mark ? 8 : 6;
  const dot = [x - around, y - around, x + around, y + around];
  if (!Number.isFinite(p.low) || !Number.isFinite(p.high)) return [dot];
  return [dot, [x - 5, scale.y(p.high) - 1, x + 5, scale.y(p.low) + 1]];
}

/** Sizes on a log scale, since levels differ by factors: most crowd at the small end, and the source may be far off. */
function scales(points, { limit, width, height, ladder }) {
  const xs = points.map((p) => p.x);
  const [least, most] = [Math.min(...xs), Math.max(...xs)];
  const room = most - least || Math.abs(least) || 1;
  const log = ladder && least > 0;
  const factor = most > least ? (most / least) ** 0.1 : 1.1;
  const span = log ? [least / factor, most * factor * 1.02] : [least - 0.07 * room, most + 0.12 * room];
  const along = log ? Math.log : (value) => value;
  const losses = points
    .flatMap((p) => [p.low, p.loss, p.high])
    .filter(Number.isFinite)
    .map((loss) => Math.max(FLOOR, loss));
  const near = limit !== null && limit >= Math.min(...losses) / 30 && limit <= Math.max(...losses) * 30;
  if (near) losses.push(limit);
  let [low, high] = [Math.min(...losses) / 1.6, Math.max(...losses) * 1.6];
  if (high / low < 30) [low, high] = [low / 3, high * 3];
  const wide = width - FRAME.left - FRAME.right;
  const tall = height - FRAME.top - FRAME.bottom;
  return {
    span,
    range: [low, high],
    limit: near,
    x: (value) => FRAME.left + ((along(value) - along(span[0])) / (along(span[1]) - along(span[0]))) * wide,
    y: (value) => height - FRAME.bottom - (Math.log(Math.max(value, low) / low) / Math.log(high / low)) * tall,
  };
}

/** The steepest step that matters, or null. The same rule as in the HTML report. */
function findCliff(points) {
  const known = points.filter((p) => p.loss > 0).sort((a, b) => b.x - a.x);
  if (known.length < 3) return null;
  const [first, last] = [known[0], known.at(-1)];
  const whole = Math.log(last.loss / first.loss) / (first.x - last.x);
  const steps = known
    .slice(1)
    .map((below, n) => ({ above: known[n], below, times: below.loss / known[n].loss }))
    .filter(({ above, below, times }) => above.x > below.x && below.loss >= MATTERS && times >= 2)
    .map((step) => ({ ...step, slope: Math.log(step.times) / (step.above.x - step.below.x) }))
    .sort((a, b) => b.slope - a.slope);
  return steps.length && whole > 0 && steps[0].slope >= 1.5 * whole ? steps[0] : null;
}

function whisker(p, scale) {
  if (!Number.isFinite(p.low) || !Number.isFinite(p.high)) return null;
  const [x, low, high] = [scale.x(p.x), scale.y(p.low), scale.y(p.high)];
  return s("path", { class: `whisker ${p.mark}`, d: `M${x} ${low}V${high}M${x - 4} ${low}h8M${x - 4} ${high}h8` });
}

function dot(p, scale) {
  const [x, y] = [scale.x(p.x), scale.y(p.loss)];
  const tip = s("title", {}, `${p.label}: KL ${small(p.loss)} (${small(p.low)} to ${small(p.high)})`);
  if (p.mark === "quality" || p.mark === "both")
    return s("rect", { class: `dot ${p.mark}`, x: x - 6, y: y - 6, width: 12, height: 12, rx: 2 }, tip);
  if (p.mark === "speed") return s("path", { class: "dot speed", d: `M${x} ${y - 8}l8 8l-8 8l-8 -8z` }, tip);
  return s("circle", { class: "dot", cx: x, cy: y, r: 4.5 }, tip);
}

function logTicks(low, high) {
  const decades = [];
  for (let n = Math.floor(Math.log10(low)); n <= Math.ceil(Math.log10(high)); n += 1) decades.push(n);
  const steps = decades.length <= 5 ? [1, 3] : [1];
  return decades
    .flatMap((n) => steps.map((step) => Number(`${step}e${n}`)))
    .filter((tick) => tick >= low && tick <= high);
}

/** 0.01, but 1e-5: what fits left of the axis. */
const shortly = (value) => (value < 1e-3 ? value.toExponential() : String(value));

function linearTicks(low, high, count) {
  const raw = (high - low) / count;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((size) => size >= raw);
  const ticks = [];
  for (let n = Math.ceil(low / step); n * step <= high; n += 1) ticks.push(Number((n * step).toPrecision(8)));
  return ticks;
}

/** Ticks that leave room for their numbers. */
function apart(ticks, x) {
  let last = -Infinity;
  return ticks.filter((tick) => x(tick) - last >= TICK_ROOM && ((last = x(tick)), true));
}

function described(points, title, cliff) {
  const listed = [...points]
    .reverse()
    .map((p) => `${p.label} at ${small(p.x)}: KL ${small(p.loss)}`)
    .join("; ");
  const fall =
    cliff &&
    ` The steepest step is from ${cliff.above.label} to ${cliff.below.label}, ${cliff.times.toFixed(1)} times the loss.`;
  return `Loss against ${title}. ${listed}.${fall ?? ""}`;
}
