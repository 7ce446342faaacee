// Several runs over each other: their losses, their norms, and where most of their layers lie, on shared axes.

import {clear, cssColor, el} from './dom.js';
import {LineChart, isLinear, union} from './lines.js';
import {rowValues, scalarColumn} from './matrix.js';

/** Of the layers of a run, so many lie below and above the band. */
const TENTH = 0.1;
export const COLORS = ['--gw-line-1', '--gw-line-2', '--gw-line-3', '--gw-line-4', '--gw-line-5', '--gw-line-6'];

export class Over {
  constructor(on) {
    this.on = on;
    this.charts = ['loss', 'norm', 'band'].map((name) => {
      const box = el('div', {className: `gw-over-${name}`}), head = el('h3');
      return {box, head, chart: new LineChart(box)};
    });
    this.key = el('p', {className: 'gw-quiet'});
    this.root = el('section', {className: 'gw-over', hidden: true}, el('h2', {}, 'Runs over each other'), this.key,
      ...this.charts.flatMap(({head, box}) => [head, box]));
  }

  /** Draw the panels' runs: {panels, stat, state, width, gutter}. Of one run there is nothing to compare. */
  draw({panels, stat, state, width, gutter}) {
    const runs = panels.map((panel, i) => ({panel, id: panel.data.id, color: cssColor(COLORS[i % COLORS.length])}))
      .filter(({panel}) => panel.data.headline);
    this.root.hidden = runs.length < 2;
    if (this.root.hidden) return;
    clear(this.key, ...runs.map(({id, color}) => el('span', {className: 'gw-key'}, el('i', {style: {background: color}}), id)));
    const spans = runs.map(({panel}) => panel.span(state));
    this.common = {width, gutter, step: state.step, spans: true, low: Math.min(...spans.map((s) => s[0])),
      high: Math.max(...spans.map((s) => s[1])),
      incidents: runs.flatMap(({panel, color}) => panel.data.incidents.map((i) => ({...i, color}))),
      on: {zoom: this.on.zoom, step: (step) => this.on.select(step, null)}};
    const [loss, norm, band] = this.charts;
    const losses = curves(runs, 'loss');
    this.#one(loss, 'loss', losses, {height: 140, linear: isLinear(losses.map((c) => c.values))});
    this.#one(norm, 'global norm before treatment', curves(runs, 'global_norm'), {height: 160});
    this.#bands(band, runs, stat);
  }

  mark(step) {
    for (const {chart} of this.charts) chart.mark(step);
  }

  #one({box, head, chart}, title, lines, more) {
    head.textContent = title;
    box.hidden = head.hidden = !lines.length;
    if (!lines.length) return chart.destroy();
    const table = union(lines);
    chart.draw({...this.common, ...more, steps: table.steps,
      series: lines.map(({label, color}, i) => ({label, color, values: table.columns[i]}))});
  }

  /** Between the tenth of the layers with the least and the tenth with the most, and the middle one. */
  #bands({box, head, chart}, runs, stat) {
    const known = runs.filter(({panel}) => panel.data.matrix?.count && panel.paths.length);
    head.textContent = `${stat.label}: the middle layer, and where eight of ten layers lie`;
    box.hidden = head.hidden = !known.length;
    if (!known.length) return chart.destroy();
    const lines = known.flatMap(({panel, id, color}) => quantiles(panel).map((values, k) => ({steps: panel.data.matrix.steps, values,
      label: k === 1 ? id : '', color, width: k === 1 ? 1.5 : 0.5})));
    const table = union(lines);
    chart.draw({...this.common, steps: table.steps, height: 180, quiet: true, linear: stat.linear, range: stat.linear ? () => [0, 1] : null,
      series: lines.map(({label, color, width}, i) => ({label, color, width, values: table.columns[i]})),
      bands: known.map(({color}, i) => ({series: [3 * i + 3, 3 * i + 1], fill: translucent(color)}))});
  }
}

function curves(runs, name) {
  return runs.map(({panel, id, color}) => ({label: id, color, steps: panel.data.headline.steps, values: scalarColumn(panel.data.headline, name)}))
    .filter(({values}) => values && values.some((v) => v !== -Infinity));
}

/** A tenth, the middle and nine tenths of the layers' values in each column, of what is finite. */
function quantiles(panel) {
  const {matrix} = panel.data, rows = panel.paths.filter((p) => !p.flat);
  const values = (rows.length ? rows : panel.paths).map((p) => rowValues(matrix, p.place));
  const found = [0, 1, 2].map(() => new Float32Array(matrix.count).fill(-Infinity));
  for (let i = 0; i < matrix.count; i++) {
    const column = values.map((row) => row[i]).filter((v) => Number.isFinite(v)).sort((a, b) => a - b);
    if (column.length) [TENTH, 0.5, 1 - TENTH].forEach((q, k) => (found[k][i] = column[Math.round(q * (column.length - 1))]));
  }
  return found;
}

function translucent(color) {
  return /^#[0-9a-f]{6}$/i.test(color) ? `${color}33` : color;
}
