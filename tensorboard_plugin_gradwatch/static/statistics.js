// What the statistics mean: label, kind of scale, how a block's rows combine, and a guide where there is one.

import {COLUMNS} from './columns.js';

const ORDER = Object.keys(COLUMNS);

/** What is known of a statistic: from the table of columns, or, of one of the user's own, what its run says (`about`). */
export function describe(name, about = null) {
  const known = COLUMNS[name] || about || {};
  return {
    name,
    label: String(known.label || name.replaceAll('_', ' ')),
    help: String(known.meaning || ''),
    combine: known.combine === 'norm' ? 'norm' : 'max',
    linear: known.scale === 'share' || known.scale === 'linear',
    guide: typeof known.guide === 'number' ? known.guide : null,
  };
}

/** Known statistics first, in the order of the table, then the others by name. */
export function sortStatistics(names) {
  const place = (name) => (ORDER.indexOf(name) + 1 || ORDER.length + 1);
  return [...names].sort((a, b) => place(a) - place(b) || (a < b ? -1 : 1));
}

/** The value of several rows as one: a norm from the sum of squares, else the largest. NaN stays, zero rows count. */
export function combine(how, values) {
  let measured = false, sum = 0, most = -Infinity;
  for (const v of values) {
    if (v === -Infinity) continue;
    if (Number.isNaN(v)) return NaN;
    measured = true;
    sum += v * v;
    if (v > most) most = v;
  }
  if (!measured) return -Infinity;
  return how === 'norm' && Number.isFinite(most) ? Math.sqrt(sum) : most;
}
