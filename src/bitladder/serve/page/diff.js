// Two texts, word by word, and the first token where two answers part.

// White space, single ideographs and hiragana, words with their marks, other marks: as unicode.py cuts texts.
const WORDS =
  /\s+|[\p{Script=Han}\p{Script=Hiragana}\u3005-\u3007]\p{M}*|(?:(?![\p{Script=Han}\p{Script=Hiragana}])[\p{L}\p{M}\p{N}_])+|[^\s\p{L}\p{M}\p{N}_]/gu;
const LONGEST = 2000; // tokens; the table is quadratic, and beyond this only the common ends are kept
const TIE_NATS = Math.LN2; // odds of two to one: rounding alone can turn them. The same limit as in the reports

const split = (text) => text.match(WORDS) ?? [];

/** Segments of `other` against `reference`: `{kind: "same" | "removed" | "added", text}`, in reading order. */
export function wordDiff(reference, other) {
  const before = split(reference);
  const after = split(other);
  let start = 0;
  while (start < before.length && start < after.length && before[start] === after[start]) start += 1;
  let end = 0;
  const shorter = Math.min(before.length, after.length) - start;
  while (end < shorter && before[before.length - 1 - end] === after[after.length - 1 - end]) end += 1;
  const left = before.slice(start, before.length - end);
  const right = after.slice(start, after.length - end);
  const middle = left.length > LONGEST || right.length > LONGEST ? replaced(left, right) : aligned(left, right);
  return merged([["same", after.slice(0, start)], ...middle, ["same", after.slice(after.length - end)]]);
}

const replaced = (left, right) => [
  ["removed", left],
  ["added", right],
];

/** Longest common subsequence. */
function aligned(left, right) {
  const wide = right.length + 1;
  const table = new Uint16Array((left.length + 1) * wide);
  for (let i = left.length - 1; i >= 0; i -= 1) {
    for (let k = right.length - 1; k >= 0; k -= 1) {
      table[i * wide + k] =
        left[i] === right[k]
          ? table[(i + 1) * wide + k + 1] + 1
          : Math.max(table[(i + 1) * wide + k], table[i * wide + k + 1]);
    }
  }
  const steps = [];
  let [i, k] = [0, 0];
  while (i < left.length || k < right.length) {
    if (i < left.length && k < right.length && left[i] === right[k]) {
      steps.push(["same", [right[k]]]);
      i += 1;
      k += 1;
    } else if (k >= right.length || (i < left.length && table[(i + 1) * wide + k] >= table[i * wide + k + 1])) {
      steps.push(["removed", [left[i]]]);
      i += 1;
    } else {
      steps.push(["added", [right[k]]]);
      k += 1;
    }
  }
  return steps;
}

/**
 * Neighbours of one kind as one segment; what was removed stands before what was added in its place. Common whitespace
 * between two changes is part of them: "a b" to "x y" is one change, not two around a common space.
 */
function merged(steps) {
  const segments = [];
  let change = { removed: "", added: "" };
  let space = "";
  const close = (text) => {
    for (const kind of ["removed", "added"]) if (change[kind]) segments.push({ kind, text: change[kind] });
    change = { removed: "", added: "" };
    const last = segments.at(-1);
    if (text && last?.kind === "same") last.text += text;
    else if (text) segments.push({ kind: "same", text });
  };
  for (const [kind, words] of steps) {
    const text = words.join("");
    if (!text) continue;
    if (kind !== "same") {
      change = { removed: change.removed + space, added: change.added + space };
      change[kind] += text;
      space = "";
    } else if (!text.trim() && (change.removed || change.added)) {
      space += text;
    } else {
      close(space + text);
      space = "";
    }
  }
  close(space);
  return segments;
}

/**
 * The first place where two answers' tokens part, or null. Each token is `{token, logprob, top: [{token, logprob}]}`.
 * `chances` holds, for each answer, the probabilities that it gave to its own token and to the other's (null when the
 * engine did not tell). A tie-break: both held both tokens within odds of two to one; rounding alone can turn it.
 */
export function parting(one, other) {
  const place = one.findIndex((token, n) => token.token !== other[n]?.token);
  const at = place < 0 ? (other.length > one.length ? one.length : -1) : place;
  if (at < 0) return null;
  const [a, b] = [one[at], other[at]];
  if (!a || !b) return { at, tokens: [a?.token ?? null, b?.token ?? null], chances: null, kind: "ended" };
  const logprob = (list, token) => list.top?.find((entry) => entry.token === token)?.logprob ?? null;
  const pairs = [
    [a.logprob, logprob(a, b.token)],
    [b.logprob, logprob(b, a.token)],
  ];
  const gaps = pairs.map(([own, others]) => (own === null || others === null ? Infinity : Math.abs(own - others)));
  return {
    at,
    tokens: [a.token, b.token],
    chances: pairs.map((pair) => pair.map((value) => (value === null ? null : Math.exp(value)))),
    kind: gaps.every((gap) => gap <= TIE_NATS) ? "tie-break" : "diverged",
  };
}
