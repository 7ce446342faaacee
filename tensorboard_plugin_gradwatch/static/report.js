// The report: the same page over data that lie in the file itself.

import {App} from './app.js';
import {columnAt} from './matrix.js';
import {format, listText, parse} from './state.js';

const FIRST = 4; // codes below it: not measured, zero, NaN, infinite

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Response(stream).arrayBuffer();
}

/** A table as a matrix over `rows` paths; those that were left out to save room were "not measured". */
async function decodeTable(packed, rows) {
  const raw = await inflate(packed.data);
  const codes = packed.bits === 8 ? new Uint8Array(raw) : new Uint16Array(raw);
  const span = (packed.high - packed.low) / (2 ** packed.bits - 1 - FIRST), special = [-Infinity, 0, NaN, Infinity];
  const given = Float32Array.from(codes, (c) => (c < FIRST ? special[c] : 10 ** (packed.low + (c - FIRST) * span)));
  const count = packed.steps.length;
  let values = given;
  if (packed.places) {
    values = new Float32Array(rows * count).fill(-Infinity);
    packed.places.forEach((place, i) => values.set(given.subarray(i * count, (i + 1) * count), place * count));
  }
  const steps = Float64Array.from(packed.steps);
  // Where steps were pooled, a column stands for all up to the next one.
  const ends = steps.map((step, i) => (packed.measured > count ? (steps[i + 1] ?? packed.last + 1) - 1 : step));
  return {steps, ends, count, rows, values, measured: packed.measured, left_out: 0, partial: Boolean(packed.places)};
}

/** Steps from `from` to `to`, and one row alone where a path is asked for. */
function part(matrix, {from = '', to = ''}, row = null) {
  const n = matrix.count;
  const first = from === '' || !n ? 0 : columnAt(matrix.steps, from);
  const last = to === '' || !n ? n : columnAt(matrix.steps, to) + 1;
  const rows = row === null ? [...Array(matrix.rows).keys()] : [row], count = Math.max(0, last - first);
  if (count === n && row === null) return matrix;
  const values = new Float32Array(rows.length * count);
  rows.forEach((r, i) => values.set(matrix.values.subarray(r * n + first, r * n + last), i * count));
  return {...matrix, steps: matrix.steps.slice(first, last), ends: matrix.ends.slice(first, last), count,
    rows: rows.length, values};
}

/** One source over the runs of a file: each is asked of its own. */
function all(runs) {
  const sources = new Map(runs.map((data) => [data.name, embedded(data)]));
  const of = (name) => (run, ...rest) => sources.get(run)[name](run, ...rest);
  return {runs: async () => ({runs: runs.map((data) => ({id: data.name, message: ''}))}),
    run: of('run'), incidents: of('incidents'), headline: of('headline'), scalars: of('scalars'), matrix: of('matrix'), histograms: of('histograms')};
}

function embedded(data) {
  const held = {};
  const once = (key, make) => (held[key] ??= make());
  const pathsOver = (over) => data.index.paths.filter((p, i) => over === 'all' || data.index.kinds[i] === over);
  const scalars = () => once('/scalars', async () => {
    const {names, steps} = data.scalars;
    const values = new Float32Array(await inflate(data.scalars.data));
    const when = Float64Array.from(steps);
    return {names, steps: when, ends: when, count: steps.length, rows: names.length, values};
  });
  return {
    single: true,
    runs: async () => ({runs: [{id: data.name, message: ''}]}),
    run: async () => ({index: data.index, stamp: 0, meta: data.meta, notes: [], has_histograms: true,
      statistics: Object.fromEntries(Object.entries(data.tables).map(([name, t]) => [name, {over: t.over, about: t.about}]))}),
    incidents: async () => ({incidents: data.incidents, verdict: data.verdict}),
    headline: scalars,
    scalars,
    matrix: async (run, statistic, query) => {
      const packed = data.tables[statistic];
      const matrix = await once(statistic, () => decodeTable(packed, pathsOver(packed.over).length));
      return part(matrix, query, query.path === undefined ? null : pathsOver(packed.over).indexOf(query.path));
    },
    histograms: async (run, path) => {
      const entry = data.histograms.paths[path];
      if (!entry) return {count: 0, rows: 0, steps: new Float64Array(0), values: new Float32Array(0), left: 0, width: 1};
      const [offset, left, rows, steps] = entry;
      const codes = new Uint8Array(await once('/histograms', () => inflate(data.histograms.data)), offset, rows * steps.length);
      return {count: steps.length, rows, steps: Float64Array.from(steps), values: Float32Array.from(codes, (c) => (c / 255) ** 2), left, width: data.histograms.width};
    },
  };
}

async function start() {
  const system = window.matchMedia('(prefers-color-scheme: dark)'), button = document.getElementById('theme');
  let chosen = null;
  const view = {
    read: () => parse(location.hash),
    write: (state) => {
      try {
        history.replaceState(null, '', format(state));
      } catch {
        // Some browsers keep a file's address as it is; the page works without a link to its state.
      }
    },
    dark: () => chosen ?? system.matches,
  };
  document.body.classList.toggle('gw-dark', view.dark());
  document.body.classList.add('gw-live');
  const held = JSON.parse(document.getElementById('data').textContent), runs = held.runs || [held];
  for (const data of runs) data.index = JSON.parse(new TextDecoder().decode(await inflate(data.index)));
  const app = new App(document.getElementById('app'), runs.length > 1 ? all(runs) : embedded(runs[0]), view);
  if (runs.length > 1 && !app.state.run) Object.assign(app.state, {run: runs[0].name, other: listText(runs.slice(1).map((data) => data.name))});
  button.hidden = false;
  button.addEventListener('click', () => {
    chosen = !view.dark();
    app.draw();
  });
  system.addEventListener('change', () => app.draw());
  await app.reload();
  for (const story of document.querySelectorAll('[data-incident]')) {
    const data = runs[Number(story.dataset.run || 0)];
    const incident = data.incidents.find((i) => i.id === Number(story.dataset.incident) && i.rule === story.dataset.rule
      && i.first_step === Number(story.dataset.step));
    if (!incident) continue;
    const show = document.createElement('button');
    show.type = 'button';
    show.textContent = 'Show it in the picture';
    show.addEventListener('click', () => app.goTo(incident, data.name));
    story.append(show);
  }
  // Paper can't be clicked: what is folded is opened for it.
  let opened = [];
  window.addEventListener('beforeprint', () => {
    opened = [...document.querySelectorAll('details.gw-case:not([open])')];
    for (const details of opened) details.open = true;
  });
  window.addEventListener('afterprint', () => {
    for (const details of opened) details.open = false;
  });
  document.body.dataset.ready = String(Math.round(performance.now()));
}

start();
