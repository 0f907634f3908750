// Numbers as people read them. What was not measured is a dash, never 0.

export const DASH = "–";

const known = (value) => typeof value === "number" && Number.isFinite(value);

/** Binary units, three significant digits: `4.58 GiB`. */
export function bytes(count) {
  if (!known(count)) return DASH;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  while (Math.abs(count) >= 1024 && place < units.length - 1) {
    count /= 1024;
    place += 1;
  }
  return place === 0
    ? `${count} B`
    : `${count.toFixed(Math.max(0, 3 - String(Math.trunc(Math.abs(count))).length))} ${units[place]}`;
}

/** Three significant digits; tiny values as a power of ten. */
export function small(value) {
  if (!known(value)) return DASH;
  if (value === 0) return "0";
  if (Math.abs(value) < 1e-4) return value.toExponential(0);
  const decimals = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
  return value.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
}

export const percent = (share, decimals = 1) => (known(share) ? `${(100 * share).toFixed(decimals)}%` : DASH);
export const fixed = (value, decimals) => (known(value) ? value.toFixed(decimals) : DASH);
export const range = (low, high, show) => (known(low) && known(high) ? `${show(low)}–${show(high)}` : "");
export const seconds = (value) =>
  known(value) ? (value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(2)} s`) : DASH;

/** "3 seconds ago" from Unix seconds. */
export function ago(at, now = Date.now() / 1000) {
  const spent = Math.max(0, Math.round(now - at));
  if (spent < 60) return `${spent} s ago`;
  if (spent < 3600) return `${Math.round(spent / 60)} min ago`;
  return new Date(at * 1000).toLocaleString();
}
