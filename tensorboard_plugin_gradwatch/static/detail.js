// What lies behind one cell: the layer's curve, and its histograms over time. Below, the cosines between tasks.

import {el, clear, cssColor} from './dom.js';
import {LineChart, union} from './lines.js';
import {rowValues, scalarColumn} from './matrix.js';
import {Ridge, zeroShare} from './ridge.js';

const COLORS = ['--gw-line-1', '--gw-line-2', '--gw-line-3', '--gw-line-4', '--gw-line-5', '--gw-line-6'];

export class Detail {
  constructor(source, on) {
    this.source = source;
    this.on = on;
    this.curveBox = el('div');
    this.ridgeBox = el('div');
    this.curve = new LineChart(this.curveBox);
    this.ridge = new Ridge(this.ridgeBox);
    this.head = el('h2');
    this.fact = el('p', {className: 'gw-quiet'});
    this.curvePart = el('div', {}, el('h3', {}, 'over time'), this.curveBox);
    this.ridgeHead = el('h3');
    this.ridgePart = el('div', {}, this.ridgeHead, this.ridgeBox);
    this.parts = el('div', {className: 'gw-parts'}, this.curvePart, this.ridgePart);
    this.root = el('section', {className: 'gw-detail'}, this.head, this.fact, this.parts);
    this.asked = 0;
  }

  /** Fetch what belongs to a path and draw it; an older answer that arrives late is dropped. */
  async show(path, {panels, stat, state, width}) {
    const ask = (this.asked += 1);
    if (!path) {
      this.key = '';
      this.head.textContent = 'One layer';
      this.fact.textContent = 'Click a cell, or move with the arrow keys, to see that layer’s curve and histograms.';
      this.parts.hidden = true;
      return;
    }
    const known = panels.filter((p) => p.paths.some((q) => q.path === path));
    const key = JSON.stringify([path, stat.name, state.from, state.to, state.run, state.other, panels.map((p) => p.data.stamp)]);
    if (key !== this.key) {
      const asks = {from: state.from, to: state.to, path, columns: 4000};
      const parameter = known.length ? weightOf(path, known[0].data.info.index) : '';
      const has = (p) => parameter && p.data.info.has_histograms;
      const [curves, histograms] = await Promise.all([
        Promise.all(known.map((p) => this.source.matrix(p.data.id, stat.name, asks).catch(() => null))),
        Promise.all(known.map((p) => (has(p) ? this.source.histograms(p.data.id, parameter).catch(() => null) : null))),
      ]);
      if (ask !== this.asked) return;
      Object.assign(this, {key, path, parameter, curves, histograms, known});
    }
    this.#draw({stat, state, width, panels});
  }

  #draw({stat, state, width, panels}) {
    const info = this.known[0] && this.known[0].paths.find((p) => p.path === this.path);
    this.head.textContent = this.path;
    this.fact.textContent = info ? facts(info, this.known[0].data.info.index) : 'A folded block: unfold it to see its layers one by one.';
    this.parts.hidden = !info;
    if (!info) return;
    const ridges = this.histograms.map((data, i) => ({data, id: this.known[i].data.id, color: cssColor(COLORS[i % COLORS.length])}))
      .filter(({data}) => data);
    const two = width >= 1000 && ridges.length;
    this.parts.classList.toggle('gw-two', Boolean(two));
    const each = two ? Math.floor((width - 24) / 2) : width;
    const table = union(this.curves.filter(Boolean).map((c) => ({steps: c.steps, values: rowValues(c, 0)})));
    const spans = panels.map((p) => p.span(state));
    this.curve.draw({
      steps: table.steps, width: each, height: 300, gutter: 70, linear: stat.linear, range: stat.linear ? () => [0, 1] : null,
      series: table.columns.map((values, i) => ({label: this.known.length > 1 ? this.known[i].data.id : stat.label, values, color: cssColor(COLORS[i])})),
      low: Math.min(...spans.map((s) => s[0])), high: Math.max(...spans.map((s) => s[1])), step: state.step,
      guide: stat.guide ? {value: stat.guide, label: `${stat.guide} is usual`} : null,
      incidents: panels.flatMap((p) => p.data.incidents).filter((i) => (i.paths || []).includes(this.path)),
      on: {zoom: this.on.zoom, step: (step) => this.on.select(step, null)},
    });
    this.ridgePart.hidden = !ridges.length;
    if (!ridges.length) return;
    const zeros = zeroShare(ridges[0].data), several = ridges.length > 1;
    const keys = ridges.map(({id, color}) => el('span', {className: 'gw-key'}, el('i', {style: {background: color}}), id));
    clear(this.ridgeHead, `log10 |gradient| of ${this.parameter}` + (zeros ? `, ${zeros}` : '') + (several ? ' ' : ''), ...(several ? keys : []));
    this.ridge.draw({runs: ridges, width: each, height: 330, step: state.step});
  }
}

function facts(info, index) {
  const at = index.paths.indexOf(info.path);
  const shape = index.shapes[at].length ? `${index.shapes[at].join(' × ')}, ${info.numel.toLocaleString('en')} entries` : '';
  const frozen = index.kinds[at] === 'parameter' && index.trainable && !index.trainable[at] ? 'frozen' : '';
  return [info.type, shape, frozen].filter(Boolean).join(' · ');
}

/** The parameter whose histograms stand for a path: itself, or the weight of that module. */
function weightOf(path, index) {
  const at = index.paths.indexOf(path);
  if (index.kinds[at] === 'parameter') return path;
  return index.paths.find((p, i) => index.kinds[i] === 'parameter' && p === `${path}.weight`)
    || index.paths.find((p, i) => index.kinds[i] === 'parameter' && p.startsWith(`${path}.`)) || '';
}

export class Tasks {
  constructor(on) {
    this.on = on;
    this.box = el('div');
    this.chart = new LineChart(this.box);
    this.root = el('section', {className: 'gw-tasks', hidden: true},
      el('h2', {}, 'Cosine between the gradients of two tasks'),
      el('p', {className: 'gw-quiet'}, 'Below zero the tasks pull against each other: a step for one is a step back for the other.'), this.box);
  }

  draw({panels, state, width}) {
    const {scalars} = panels[0].data;
    const names = (scalars?.names || []).filter((name) => name.startsWith('task_cos/'));
    this.root.hidden = !names.length;
    if (!names.length) return;
    const keep = Array.from(scalars.steps.keys()).filter((i) => names.some((n) => scalarColumn(scalars, n)[i] !== -Infinity));
    const [low, high] = panels[0].span(state);
    this.chart.draw({
      steps: keep.map((i) => scalars.steps[i]), width, height: 220, gutter: 70, linear: true, range: () => [-1.05, 1.05], low, high, step: state.step,
      guide: {value: 0, label: ''}, incidents: [],
      series: names.map((name, k) => {
        const values = scalarColumn(scalars, name);
        return {label: name.slice('task_cos/'.length).replace('/', ' · '), values: keep.map((i) => values[i]), color: cssColor(COLORS[k % COLORS.length])};
      }),
      on: {zoom: this.on.zoom, step: (step) => this.on.select(step, null)},
    });
  }
}

export function emptyNote(place, text) {
  clear(place, el('p', {className: 'gw-empty'}, text));
}
