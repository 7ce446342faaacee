// Curves over steps, by uPlot. On a logarithmic axis zeros and non-finite values have no place: they become ticks.

import uPlot from './vendor/uPlot.js';
import {cssColor, number, ticks} from './dom.js';

/** Kept free on the right, so that the last label of the axis is not cut off. The heatmap keeps the same. */
export const MARGIN = 16;

const SEVERITY = {critical: '--gw-critical', warning: '--gw-warning', info: '--gw-info'};

/**
 * One chart of several series over common steps.
 *
 * @param {HTMLElement} place where it is drawn; emptied first.
 * @param {object} spec {title, steps, series: [{label, values, color, width, dash, apartFrom: values of a curve it is drawn beside only where it leaves it}], width, height, gutter, linear,
 *   range: [min, max], quiet: no legend, bands: [{series: [upper, lower], fill}], spans: true where a curve goes on over steps it has no point at,
 *   guide: {value, label}, incidents, low, high, step, on: {zoom, step}}.
 */
export class LineChart {
  constructor(place) {
    this.place = place;
    this.plot = null;
  }

  draw(spec) {
    this.spec = spec;
    this.plot?.destroy();
    const drawn = spec.series.map((one) => clean(one.values, spec.linear));
    this.counts = drawn.map((values) => values.filter((v) => v !== null).length);
    spec.series.forEach((one, i) => one.apartFrom && (drawn[i] = apart(drawn[i], one.values, one.apartFrom)));
    this.bad = spec.series.map((one) => one.values);
    this.plot = new uPlot(this.#options(spec, drawn), [Array.from(spec.steps), ...drawn], this.place);
  }

  mark(step) {
    if (!this.plot) return;
    this.spec.step = step;
    this.plot.redraw(false);
  }

  destroy() {
    this.plot?.destroy();
    this.plot = null;
  }

  #options(spec, drawn) {
    const last = Math.max(spec.high, spec.low + 1), room = spec.width - spec.gutter - MARGIN;
    const muted = () => cssColor('--gw-muted'), grid = {stroke: () => cssColor('--gw-grid'), width: 1};
    return {
      width: spec.width, height: spec.height, padding: [8, MARGIN, 0, 0],
      title: spec.title || '', legend: {live: true, show: !spec.quiet},
      cursor: {drag: {x: true, y: false, setScale: false}, points: {size: 5}},
      scales: {
        x: {time: false, range: () => [spec.low, last]},
        y: spec.linear ? {range: spec.range || ((u, a, b) => padded(a, b))} : {distr: 3, range: (u, a, b) => decades(a, b, spec)},
      },
      axes: [
        // The heatmap's own steps.
        {stroke: muted, grid, ticks: grid, size: 28, font: '11px system-ui, sans-serif', splits: () => ticks(spec.low, last - 1, Math.max(2, room / 90))},
        {stroke: muted, grid, ticks: {show: false}, size: spec.gutter, font: '11px system-ui, sans-serif',
          // uPlot knows no steps above 1e32, and of those below 5 only its own; it leaves out an axis for which it finds none.
          ...(spec.linear ? {space: 20} : {incrs: (u, i, low, high) => [Math.max(5, high - low)], splits: (u, i, low, high) => powers(low, high), filter: (u, splits) => splits}),
          values: (u, splits) => splits.map((v) => (v === null ? '' : number(v)))},
      ],
      series: [
        {label: 'step', value: (u, v) => (v === null ? '' : String(v))},
        ...spec.series.map((one, i) => ({
          label: one.label, stroke: one.color, width: one.width || 1.5, dash: one.dash, spanGaps: Boolean(spec.spans),
          points: {size: 4, ...pointsOf(drawn[i], this.counts[i] < 60 && !one.dash)},
          value: (u, v, s, at) => (at === null || at === undefined ? '' : said(this.bad[i][at])),
        })),
      ],
      bands: spec.bands || [],
      hooks: {
        draw: [(u) => this.#extras(u)],
        setSelect: [(u) => {
          if (u.select.width > 4) spec.on.zoom(Math.floor(u.posToVal(u.select.left, 'x')), Math.ceil(u.posToVal(u.select.left + u.select.width, 'x')));
        }],
        ready: [(u) => {
          let down = 0;
          u.over.addEventListener('pointerdown', (event) => (down = event.clientX));
          u.over.addEventListener('pointerup', (event) => {
            const at = u.posToIdx(u.cursor.left);
            if (Math.abs(event.clientX - down) < 4 && spec.on.step && u.data[0].length) spec.on.step(u.data[0][at]);
          });
          u.over.addEventListener('dblclick', () => spec.on.zoom('', ''));
        }],
      },
    };
  }

  /** Incidents, the chosen step, the guide line, and ticks for what a logarithm can't show. */
  #extras(u) {
    const {spec} = this, g = u.ctx, ratio = window.devicePixelRatio || 1;
    const {left, top, width, height} = u.bbox;
    g.save();
    g.beginPath();
    g.rect(left, top, width, height);
    g.clip();
    const line = (step, color, w, dash = []) => {
      const x = Math.round(u.valToPos(step, 'x', true));
      g.strokeStyle = color;
      g.lineWidth = w * ratio;
      g.setLineDash(dash);
      g.beginPath();
      g.moveTo(x, top);
      g.lineTo(x, top + height);
      g.stroke();
    };
    for (const incident of spec.incidents || []) {
      if (incident.first_step < spec.low || incident.first_step > spec.high) continue;
      line(incident.first_step, incident.color || cssColor(SEVERITY[incident.severity] || '--gw-info'), 1, [3 * ratio, 3 * ratio]);
    }
    if (spec.guide) {
      const y = Math.round(u.valToPos(spec.guide.value, 'y', true));
      g.strokeStyle = g.fillStyle = cssColor('--gw-muted');
      g.setLineDash([6 * ratio, 4 * ratio]);
      g.lineWidth = ratio;
      g.beginPath();
      g.moveTo(left, y);
      g.lineTo(left + width, y);
      g.stroke();
      g.font = `${11 * ratio}px system-ui, sans-serif`;
      g.fillText(spec.guide.label, left + 6 * ratio, y - 4 * ratio);
    }
    g.setLineDash([]);
    this.bad.forEach((values) => {
      for (let i = 0; i < values.length; i++) {
        const v = values[i];
        const infinite = Number.isNaN(v) || v === Infinity, zero = v === 0 && !spec.linear;
        if (!infinite && !zero) continue;
        g.fillStyle = infinite ? cssColor('--gw-critical') : cssColor('--gw-muted');
        g.fillRect(u.valToPos(u.data[0][i], 'x', true) - ratio, infinite ? top : top + height - 6 * ratio, 2 * ratio, 6 * ratio);
      }
    });
    if (spec.step !== '' && Number.isFinite(spec.step)) line(spec.step, cssColor('--gw-text'), 1);
    g.restore();
  }
}

function clean(values, linear) {
  return Array.from(values, (v) => (Number.isFinite(v) && (linear || v > 0) ? v : null));
}

/** Few points are drawn as such; of many, and of dashes, those alone that no line reaches. */
function pointsOf(drawn, all) {
  if (all) return {show: true};
  const alone = drawn.flatMap((v, i) => (v !== null && (drawn[i - 1] ?? null) === null && (drawn[i + 1] ?? null) === null ? [i] : []));
  return {show: false, filter: () => (alone.length ? alone : null)};
}

/** Without the points at which a curve lies on another, and would hide it; next to where it leaves it they stay. */
function apart(drawn, values, others) {
  const lies = Array.from(values, (v, i) => Math.abs(v - others[i]) <= 1e-6 * Math.abs(others[i]));
  return drawn.map((v, i) => ((lies[i - 1] ?? true) && lies[i] && (lies[i + 1] ?? true) ? null : v));
}

function said(value) {
  return value === -Infinity || value === undefined ? 'not measured' : number(value);
}

function padded(a, b) {
  if (a === null || a === undefined) return [0, 1];
  const room = (b - a) * 0.08 || Math.abs(a) * 0.1 || 1;
  return [a - room, b + room];
}

/** Where a logarithmic axis has its lines: at powers of ten alone, at every second or third where there are many. */
function powers(low, high) {
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
  const stride = Math.max(1, Math.ceil((last - first) / 6)), found = [];
  for (let p = first; p <= last; p += stride) found.push(10 ** p);
  return found;
}

/** Whole decades around the data, at least one of them. */
function decades(a, b, spec) {
  const values = [a, b, spec.guide?.value].filter((v) => v > 0 && Number.isFinite(v));
  if (!values.length) return [0.1, 1];
  const low = Math.floor(Math.log10(Math.min(...values)) + 1e-9), high = Math.ceil(Math.log10(Math.max(...values)) - 1e-9);
  return [10 ** low, 10 ** Math.max(high, low + 1)];
}

/** Whether curves are drawn on a linear axis: some are not above zero, or all within a hundredfold. */
export function isLinear(columns) {
  let least = Infinity, most = -Infinity;
  for (const values of columns) {
    for (const v of values) {
      if (!Number.isFinite(v)) continue;
      least = Math.min(least, v);
      most = Math.max(most, v);
    }
  }
  return least <= 0 || most < 100 * least;
}

/** Several curves on the union of their steps. */
export function union(curves) {
  const steps = [...new Set(curves.flatMap((c) => Array.from(c.steps)))].sort((a, b) => a - b);
  const place = new Map(steps.map((s, i) => [s, i]));
  const columns = curves.map((c) => {
    const out = new Float32Array(steps.length).fill(-Infinity);
    c.steps.forEach((s, i) => (out[place.get(s)] = c.values[i]));
    return out;
  });
  return {steps, columns};
}
