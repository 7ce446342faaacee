// Matrices as they arrive, and what is read from them. -Infinity: not measured; NaN and Infinity: measured so.

import {combine} from './statistics.js';

/**
 * Decode header, steps and matrix.
 * @returns {object} the header's fields, `steps` and `ends` (first and last step of each column, Float64Array) and
 *   `values` (Float32Array, row after row in time).
 */
export function decode(buffer) {
  const length = new Float64Array(buffer, 0, 1)[0];
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const n = header.steps, m = header.rows;
  const steps = new Float64Array(buffer, 8 + length, n);
  const ends = new Float64Array(buffer, 8 + length + 8 * n, n);
  const byStep = new Float32Array(buffer, 8 + length + 16 * n, n * m);
  const values = new Float32Array(n * m);
  for (let i = 0; i < n; i++) for (let r = 0; r < m; r++) values[r * n + i] = byStep[i * m + r];
  return {...header, count: n, rows: m, steps, ends, values};
}

export function rowValues(matrix, row) {
  return matrix.values.subarray(row * matrix.count, (row + 1) * matrix.count);
}

/** The values over time of one displayed row: of one path, or of a folded block. */
export function displayValues(matrix, row, how) {
  if (row.members.length === 1) return rowValues(matrix, row.members[0]);
  const parts = row.members.map((place) => rowValues(matrix, place));
  const out = new Float32Array(matrix.count), column = new Array(parts.length);
  for (let i = 0; i < matrix.count; i++) {
    for (let k = 0; k < parts.length; k++) column[k] = parts[k][i];
    out[i] = combine(how, column);
  }
  return out;
}

/** The last column that begins at or before a step; 0 where none does. */
export function columnAt(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (steps[middle] <= step) low = middle;
    else high = middle - 1;
  }
  return Math.max(0, low);
}

/**
 * Steps a matrix spans, the width of its last column included: to the end of its steps, where it stands for several, or to that of
 * the run (`last`, its last step); else as wide as the others.
 */
export function extent(matrix, last = null) {
  const {steps, ends, count} = matrix;
  if (!count) return [0, 1];
  const begin = steps[count - 1], end = ends[count - 1];
  if (last !== null && last >= begin) return [steps[0], Math.max(end, last) + 1];
  if (end > begin) return [steps[0], end + 1];
  const gap = count > 1 ? (begin - steps[0]) / (count - 1) : 1;
  return [steps[0], begin + Math.max(1, Math.min(gap, 1e9))];
}

/** What a column stands for: "step 60", or "steps 50–99, largest". */
export function spanText(matrix, at) {
  const {steps, ends} = matrix;
  return ends[at] > steps[at] ? `steps ${steps[at]}–${ends[at]}, largest` : `step ${steps[at]}`;
}

/** A named column of a table of scalars: steps and values of what was measured. */
export function scalarColumn(table, name) {
  const at = (table.names || []).indexOf(name);
  return at < 0 ? null : rowValues(table, at);
}
