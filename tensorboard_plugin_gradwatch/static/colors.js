// Colours of values: viridis for sizes, two greys for zero and for "not measured", red for what is not finite.

const VIRIDIS = ['440154', '482878', '3e4989', '31688e', '26828e', '1f9e89', '35b779', '6ece58', 'b5de2b', 'fde725'];
const STOPS = VIRIDIS.map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));

export const LEVELS = 256;
export const NONFINITE = [229, 0, 46];
export const ZERO = [150, 150, 150];

/** "Not measured" keeps near the page's own colour, so that gaps read as gaps. */
export function missingColor(dark) {
  return dark ? [62, 62, 66] : [228, 228, 232];
}

export function rgbAt(t) {
  const at = Math.min(1, Math.max(0, t)) * (STOPS.length - 1);
  const k = Math.min(STOPS.length - 2, Math.floor(at));
  return STOPS[k].map((a, c) => Math.round(a + (STOPS[k + 1][c] - a) * (at - k)));
}

export function css(rgb) {
  return `rgb(${rgb[0]},${rgb[1]},${rgb[2]})`;
}

const pixel = ([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;

/** The palette as little-endian RGBA words: LEVELS sizes, then zero, not measured, not finite. */
export function palette(dark) {
  const words = new Uint32Array(LEVELS + 3);
  for (let i = 0; i < LEVELS; i++) words[i] = pixel(rgbAt(i / (LEVELS - 1)));
  words[LEVELS] = pixel(ZERO);
  words[LEVELS + 1] = pixel(missingColor(dark));
  words[LEVELS + 2] = pixel(NONFINITE);
  return words;
}

/** Place of a value in the palette, for a range of log10 (or of shares, where `linear`). */
export function levelOf(value, range) {
  if (value === -Infinity) return LEVELS + 1;
  if (!Number.isFinite(value)) return LEVELS + 2;
  if (value === 0 && !range.linear) return LEVELS;
  const t = ((range.linear ? value : Math.log10(Math.abs(value))) - range.low) / (range.high - range.low || 1);
  return t <= 0 ? 0 : t >= 1 ? LEVELS - 1 : Math.round(t * (LEVELS - 1));
}

/**
 * The range of colours over the rows on view: from the 1st to the 99th percentile of what is finite and above zero, so that one
 * explosion does not flatten the whole picture; what lies outside saturates. `least` and `most` are the extremes.
 */
export function rangeOf(series, linear) {
  if (linear) return {low: 0, high: 1, least: 0, most: 1, linear: true};
  const logs = [];
  let least = Infinity, most = -Infinity;
  const total = series.reduce((n, values) => n + values.length, 0), stride = Math.max(1, Math.floor(total / 50000));
  let at = 0;
  for (const values of series) {
    for (let i = 0; i < values.length; i++, at++) {
      const v = values[i];
      if (!(v > 0 && v < Infinity)) continue;
      if (v < least) least = v;
      if (v > most) most = v;
      if (at % stride === 0) logs.push(Math.log10(v));
    }
  }
  if (!logs.length) return {low: -6, high: 0, least: -6, most: 0, linear: false};
  logs.sort((a, b) => a - b);
  let low = logs[Math.floor(0.01 * (logs.length - 1))];
  let high = logs[Math.ceil(0.99 * (logs.length - 1))];
  if (high - low < 0.5) [low, high] = [(low + high) / 2 - 0.25, (low + high) / 2 + 0.25];
  return {low, high, least: Math.max(Math.log10(least), low - 3), most: Math.log10(most), linear: false};
}
