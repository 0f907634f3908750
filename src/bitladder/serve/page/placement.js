// Where the names in a chart go: each takes the nearest place that is free. The report's placement.py is the same.
// Boxes are [left, top, right, bottom], y downwards; text is 12 units high.

// Units of the drawing: capitals and underscores, which names of levels are made of, are wide.
export const CHARACTER = 7.6;
export const BOLD = 8.2; // of the chosen levels' names
export const BESIDE = 11; // from the middle of a mark to a name beside it
export const LINE = 14;
const FURTHEST = 8 * LINE;

/** A text of this width whose baseline is at `y`. */
export function placeOf(x, y, anchor, wide) {
  const left = x - { start: 0, middle: wide / 2, end: wide }[anchor];
  return { x, y, anchor, box: [left, y - 11, left + wide, y + 3] };
}

/** Places around a mark, the nearest first: beside it, then line by line above and below, further aside last. */
export function placesAround(x, y, wide) {
  const rises = [0];
  for (let step = LINE; step <= FURTHEST; step += LINE) rises.push(-step, step);
  return [BESIDE, 4 * BESIDE].flatMap((aside) =>
    rises.flatMap((rise) => [
      placeOf(x + aside, y + 4 + rise, "start", wide),
      placeOf(x - aside, y + 4 + rise, "end", wide),
      ...(rise ? [placeOf(x, y + 4 + rise, "middle", wide)] : []),
    ]),
  );
}

/** The first place inside the area that covers nothing taken, `free`; else the one that covers least. */
export function firstFree(places, taken, area) {
  let [best, least] = [null, Infinity];
  for (const place of places) {
    const cost = 50 * outside(place.box, area) + taken.reduce((sum, other) => sum + overlap(place.box, other), 0);
    if (cost === 0) return { ...place, free: true };
    if (cost < least) [best, least] = [place, cost];
  }
  return { ...best, free: false };
}

const outside = (box, area) => Math.max(0, area[0] - box[0], area[1] - box[1], box[2] - area[2], box[3] - area[3]);

function overlap(one, other) {
  const wide = Math.min(one[2], other[2]) - Math.max(one[0], other[0]);
  const tall = Math.min(one[3], other[3]) - Math.max(one[1], other[1]);
  return wide > 0 && tall > 0 ? wide * tall : 0;
}
