// Loss against size or speed: log scale for KL, intervals as bars, the chosen pair marked, the cliff named.

import { s } from "./dom.js";
import { small } from "./format.js";

const FRAME = { left: 50, right: 18, top: 22, bottom: 44 };
const FLOOR = 1e-5; // nats; on a log scale zero is infinitely far down
const CHARACTER = 7.6; // units of the drawing: capitals and underscores, which names of levels are made of, are wide
const TICK_ROOM = 48;
const TOO_CLOSE = 60; // square pixels of overlap
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
    ...labels(known, scale, width, scale.limit ? [[FRAME.left, scale.y(limit) - 2, right, scale.y(limit) + 2]] : []),
  );

  function limitLabel() {
    const anchor = ladder ? "end" : "start";
    return text("limit-label", ladder ? right : FRAME.left, scale.y(limit) - 6, `bar: ${limit}`, anchor);
  }

  function cliffBand({ above, below, times }) {
    const [from, to] = [scale.x(below.x), scale.x(above.x)];
    return [
      s("rect", { class: "cliff", x: from, y: FRAME.top, width: to - from, height: bottom - FRAME.top }),
      text("cliff-label", to + 6, FRAME.top + 12, `the cliff: ×${times.toFixed(1)}`),
    ];
  }
}

/** Sizes on a log scale, since levels differ by factors: most crowd at the small end, and the source may be far off. */
function scales(points, { limit, width, height, ladder }) {
  const xs = points.map((p) => p.x);
  const [least, most] = [Math.min(...xs), Math.max(...xs)];
  const room = most - least || Math.abs(least) || 1;
  const log = ladder && least > 0;
  const factor = (most / least) ** 0.1 || 1.1;
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

/**
 * Names beside the dots: each takes the place that overlaps dots, intervals and `lines` least, chosen levels first. A
 * name that finds no free place is left out; the table below has it, and so has the dot's own title.
 */
function labels(points, scale, width, lines) {
  const marks = points.flatMap((p) => {
    const [x, y] = [scale.x(p.x), scale.y(p.loss)];
    const dot = [x - 6, y - 6, x + 6, y + 6];
    return Number.isFinite(p.low) && Number.isFinite(p.high)
      ? [dot, [x - 4, scale.y(p.high), x + 4, scale.y(p.low)]]
      : [dot];
  });
  const taken = [...lines, ...marks];
  return [...points]
    .sort((a, b) => Boolean(b.mark) - Boolean(a.mark))
    .map((p) => {
      const said = p.mark ? `${p.label} · ${p.mark === "both" ? "both tiers" : p.mark}` : p.label;
      const wide = said.length * CHARACTER;
      const places = [0, -14, 14, -26, 26].flatMap((rise) =>
        [1, -1].map((side) => place(p, wide, rise, side)),
      );
      const best = places.reduce((one, other) => (other.cost < one.cost ? other : one));
      if (!p.mark && best.cost > TOO_CLOSE) return null;
      taken.push(best.box);
      return s("text", { class: `label ${p.mark}`, x: best.x, y: best.y, "text-anchor": best.anchor }, said);
    });

  function place(p, wide, rise, side) {
    const x = scale.x(p.x) + side * 11;
    const y = scale.y(p.loss) + 4 + rise;
    const left = side > 0 ? x : x - wide;
    const box = [left, y - 11, left + wide, y + 3];
    const outside = Math.max(0, FRAME.left - box[0], box[2] - width, FRAME.top - box[1]);
    const cost = taken.reduce((sum, other) => sum + overlap(box, other), 0) + 50 * outside + Math.abs(rise) / 2;
    return { x, y, box, cost, anchor: side > 0 ? "start" : "end" };
  }
}

function overlap(one, other) {
  const wide = Math.min(one[2], other[2]) - Math.max(one[0], other[0]);
  const tall = Math.min(one[3], other[3]) - Math.max(one[1], other[1]);
  return wide > 0 && tall > 0 ? wide * tall : 0;
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
