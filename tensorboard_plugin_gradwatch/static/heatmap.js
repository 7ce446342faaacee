// The heatmap: rows are paths in forward order, columns are steps, colour is size.

import {el, clear, cssColor, number, sizeCanvas, ticks} from './dom.js';
import {LEVELS, levelOf, palette} from './colors.js';
import {MARGIN} from './lines.js';
import {columnAt, displayValues, spanText} from './matrix.js';

const AXIS = 18;
const TICKS = 12;

export class Heatmap {
  /** @param {object} on `select(step, row)`, `zoom(from, to)`, `fold(block)`, `incident(incident)`. */
  constructor(on) {
    this.on = on;
    this.canvas = el('canvas', {className: 'gw-cells', role: 'img', 'aria-label': 'Heatmap: paths by steps'});
    this.overlay = el('canvas', {className: 'gw-overlay'});
    this.gutter = el('div', {className: 'gw-gutter'});
    this.tip = el('div', {className: 'gw-tip', hidden: true});
    this.top = el('div', {className: 'gw-ticks'});
    this.axis = el('canvas', {className: 'gw-axis'});
    this.plot = el('div', {className: 'gw-plot', tabIndex: 0, role: 'group', 'aria-label': 'Heatmap: arrow keys walk over its cells'},
      this.canvas, this.overlay, this.tip);
    this.body = el('div', {className: 'gw-body'}, this.gutter, this.plot);
    this.root = el('div', {className: 'gw-heat'}, this.top, this.body, this.axis);
    this.#listen();
  }

  /** Draw `view`: {matrix, span, layout, stat, range, dark, width, gutter, incidents}. */
  draw(view) {
    this.view = view;
    const {matrix, layout, width, gutter, stat} = view;
    this.width = Math.max(40, width - gutter - MARGIN);
    [this.low, this.high] = view.span;
    this.gutter.style.width = `${gutter}px`;
    this.gutter.style.height = `${layout.height}px`;
    this.plot.style.width = `${this.width}px`;
    this.plot.style.height = `${layout.height}px`;
    this.series = layout.rows.map((row) => displayValues(matrix, row, stat.combine));
    this.#cells();
    this.#labels();
    this.#axis();
    this.#incidents();
    this.mark(this.step, this.path);
  }

  x(step) {
    return ((step - this.low) / (this.high - this.low)) * this.width;
  }

  stepAt(x) {
    return this.low + (x / this.width) * (this.high - this.low);
  }

  /** Show the chosen step as a line and the chosen row as a frame. */
  mark(step, path) {
    this.step = step;
    this.path = path;
    if (!this.view) return;
    const {layout} = this.view;
    const g = sizeCanvas(this.overlay, this.width, layout.height);
    const row = path && layout.rows.find((r) => r.path === path);
    if (row) {
      g.strokeStyle = cssColor('--gw-mark');
      g.lineWidth = 1.5;
      g.strokeRect(0.75, row.y + 0.25, this.width - 1.5, Math.max(2, row.height - 0.5));
    }
    if (Number.isFinite(step) && step !== '' && step >= this.low && step <= this.high) {
      const x = this.#middle(step);
      g.fillStyle = 'rgba(255,255,255,.85)';
      g.fillRect(x - 1.5, 0, 3, layout.height);
      g.fillStyle = 'rgba(0,0,0,.9)';
      g.fillRect(x - 0.5, 0, 1, layout.height);
    }
    for (const label of this.gutter.querySelectorAll('.gw-chosen')) label.classList.remove('gw-chosen');
    const chosen = row && this.gutter.querySelector(`[data-row="${layout.rows.indexOf(row)}"]`);
    if (chosen) chosen.classList.add('gw-chosen');
  }

  #middle(step) {
    const {steps, ends, count} = this.view.matrix;
    const at = columnAt(steps, step), right = at + 1 < count ? steps[at + 1] : this.high;
    // Within a column of many steps the step has a place of its own, as it has in the curves.
    const left = this.x(ends[at] > steps[at] ? Math.max(step, steps[at]) : steps[at]);
    return Math.round((left + Math.min(this.x(right), left + Math.min(12, ends[at] > steps[at] ? this.x(this.low + 1) : 12))) / 2);
  }

  #cells() {
    const {matrix, layout, range, dark} = this.view;
    const ratio = window.devicePixelRatio || 1;
    const w = Math.max(1, Math.round(this.width * ratio)), h = Math.max(1, Math.round(layout.height * ratio));
    this.canvas.width = w;
    this.canvas.height = h;
    this.canvas.style.width = `${this.width}px`;
    this.canvas.style.height = `${layout.height}px`;
    if (!matrix.count || !layout.rows.length) return;
    const words = palette(dark), first = new Int32Array(w), last = new Int32Array(w);
    for (let x = 0; x < w; x++) {
      first[x] = columnAt(matrix.steps, this.stepAt(x / ratio));
      last[x] = Math.max(first[x], columnAt(matrix.steps, this.stepAt((x + 0.999) / ratio)));
    }
    const context = this.canvas.getContext('2d');
    const image = context.createImageData(w, h);
    const out = new Uint32Array(image.data.buffer), line = new Uint32Array(w);
    const levels = new Uint16Array(matrix.count);
    layout.rows.forEach((row, r) => {
      const values = this.series[r];
      for (let i = 0; i < matrix.count; i++) levels[i] = levelOf(values[i], range);
      for (let x = 0; x < w; x++) {
        let level = levels[first[x]];
        for (let i = first[x] + 1; i <= last[x]; i++) level = strongest(level, levels[i]);
        line[x] = words[level];
      }
      const from = Math.round(row.y * ratio), to = Math.round((row.y + row.height) * ratio);
      // A hairline between rows and a wider one between blocks, where there is room.
      const rim = row.height >= 8 ? 1 : 0;
      for (let y = from; y < to - rim; y++) out.set(line, y * w);
    });
    context.putImageData(image, 0, 0);
  }

  #labels() {
    const {layout, gutter} = this.view;
    const nodes = [];
    let free = -1e9;
    for (const block of layout.blocks) {
      const roomy = block.y >= free && block.height >= 7;
      if (roomy) free = block.y + 12;
      nodes.push(el('button', {
        className: 'gw-block' + (block.folded ? ' gw-folded' : '') + (roomy ? '' : ' gw-tight'), type: 'button', data: {block: block.name},
        title: `${block.name}: ${block.count} paths. Click to ${block.folded ? 'unfold' : 'fold'}.`,
        'aria-expanded': String(!block.folded), style: {top: `${block.y}px`, height: `${block.height}px`},
      }, roomy ? el('span', {}, (block.folded ? '▸ ' : '▾ ') + block.name) : ''));
    }
    const inBlock = new Set(layout.blocks.map((b) => b.name));
    const longest = Math.max(0, ...layout.blocks.map((b) => b.name.length));
    const beside = gutter - 8 - Math.min(0.45 * gutter, 6.5 * longest + 20);
    free = -1e9;
    layout.rows.forEach((row, i) => {
      const alone = !inBlock.has(row.block);
      if (row.folded || (row.height < 11 && !(alone && row.y >= free))) return;
      free = row.y + 11;
      nodes.push(el('div', {
        className: 'gw-label' + (alone ? ' gw-alone' : ''), title: row.path, data: {row: String(i)},
        style: {top: `${Math.max(0, row.y + (row.height - 12) / 2)}px`, width: `${alone ? gutter - 8 : beside}px`},
      }, el('bdi', {}, row.label)));
    });
    clear(this.gutter, ...nodes);
  }

  #axis() {
    const {gutter} = this.view;
    const g = sizeCanvas(this.axis, this.width + gutter + MARGIN, AXIS);
    g.fillStyle = cssColor('--gw-muted');
    g.font = '11px system-ui, sans-serif';
    g.textAlign = 'center';
    for (const step of ticks(this.low, this.high - 1, Math.max(2, this.width / 90))) {
      const x = gutter + this.x(step);
      g.fillRect(x, 0, 1, 4);
      const text = String(Math.round(step));
      const half = g.measureText(text).width / 2;
      g.fillText(text, Math.min(x, gutter + this.width + MARGIN - half), 15);
    }
    g.textAlign = 'right';
    g.fillText('step', gutter - 16, 15);
  }

  #incidents() {
    const {incidents, gutter} = this.view;
    this.top.style.height = `${TICKS}px`;
    clear(this.top, ...incidents.filter((i) => i.first_step >= this.low && i.first_step <= this.high).map((incident) => el('button', {
      className: `gw-tick gw-${incident.severity}`, type: 'button',
      title: `step ${incident.first_step}: ${incident.name || incident.rule} in ${incident.first_path || 'the whole model'}`,
      'aria-label': `Go to ${incident.rule} at step ${incident.first_step}`,
      style: {left: `${gutter + this.x(incident.first_step) - 5}px`}, onclick: () => this.on.incident(incident),
    })));
  }

  #rowAt(y) {
    return this.view.layout.rows.find((row) => y >= row.y && y < row.y + row.height);
  }

  #listen() {
    this.gutter.addEventListener('click', (event) => {
      const block = event.target.closest('[data-block]');
      const label = event.target.closest('[data-row]');
      if (label) this.on.select(this.step, this.view.layout.rows[Number(label.dataset.row)]);
      else if (block) this.on.fold(block.dataset.block);
    });
    let from = null;
    const at = (event) => {
      const box = this.plot.getBoundingClientRect();
      return [Math.min(Math.max(event.clientX - box.left, 0), this.width - 1), event.clientY - box.top];
    };
    this.plot.addEventListener('pointerdown', (event) => {
      if (event.button !== 0) return;
      from = at(event);
      this.plot.setPointerCapture(event.pointerId);
    });
    this.plot.addEventListener('pointermove', (event) => {
      if (!this.view) return;
      const [x, y] = at(event);
      if (from && Math.abs(x - from[0]) > 5) this.#band(from[0], x);
      else this.#tooltip(x, y);
    });
    this.plot.addEventListener('pointerup', (event) => {
      if (!from || !this.view) return;
      const [x, y] = at(event), start = from[0];
      from = null;
      if (Math.abs(x - start) > 5) {
        this.on.zoom(Math.floor(this.stepAt(Math.min(x, start))), Math.ceil(this.stepAt(Math.max(x, start))));
      } else if (this.view.matrix.count) {
        const row = this.#rowAt(y);
        if (row) this.on.select(this.view.matrix.steps[columnAt(this.view.matrix.steps, this.stepAt(x))], row);
      }
    });
    this.plot.addEventListener('pointerleave', () => (this.tip.hidden = true));
    this.plot.addEventListener('dblclick', () => this.on.zoom('', ''));
  }

  #band(a, b) {
    this.mark(this.step, this.path);
    const g = this.overlay.getContext('2d');
    g.fillStyle = 'rgba(255,255,255,.35)';
    g.fillRect(Math.min(a, b), 0, Math.abs(b - a), this.view.layout.height);
    this.tip.hidden = true;
  }

  #tooltip(x, y) {
    const {matrix, layout, stat} = this.view;
    const row = this.#rowAt(y);
    if (!row || !matrix.count) return void (this.tip.hidden = true);
    const i = columnAt(matrix.steps, this.stepAt(x));
    const value = this.series[layout.rows.indexOf(row)][i];
    const said = value === -Infinity ? 'not measured' : number(value);
    clear(this.tip, el('b', {}, row.path || '(root)'), el('br'),
      `${spanText(matrix, i)}: ${stat.label} ${said}`);
    this.tip.hidden = false;
    const right = x > this.width / 2;
    this.tip.style.left = right ? '' : `${x + 14}px`;
    this.tip.style.right = right ? `${this.width - x + 14}px` : '';
    this.tip.style.top = `${y + 14}px`;
  }
}

/** Of two levels that fall on one pixel: not finite, else the larger; zero and "not measured" give way. */
function strongest(a, b) {
  if (a === LEVELS + 2 || b === LEVELS + 2) return LEVELS + 2;
  if (a >= LEVELS && b >= LEVELS) return Math.min(a, b);
  if (a >= LEVELS) return b;
  if (b >= LEVELS) return a;
  return Math.max(a, b);
}
