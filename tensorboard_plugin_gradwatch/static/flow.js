// The gradient-flow picture: one bar per layer at one step, from the input on the left to the output on the right.

import {el, clear, cssColor, elide, number, sizeCanvas, power} from './dom.js';
import {NONFINITE, ZERO, css, levelOf, missingColor, rgbAt, LEVELS} from './colors.js';
import {MARGIN} from './lines.js';
import {columnAt, displayValues, spanText} from './matrix.js';

export class Flow {
  /** @param {object} on `select(step, row)`. */
  constructor(on) {
    this.on = on;
    this.canvas = el('canvas', {role: 'img', 'aria-label': 'Bars: one per layer at the chosen step'});
    this.tip = el('div', {className: 'gw-tip', hidden: true});
    this.root = el('div', {className: 'gw-flow'}, this.canvas, this.tip);
    this.canvas.addEventListener('pointermove', (event) => this.#tooltip(event));
    this.canvas.addEventListener('pointerleave', () => (this.tip.hidden = true));
    this.canvas.addEventListener('click', (event) => {
      const row = this.#rowAt(event);
      if (row) this.on.select(this.view.step, row);
    });
  }

  draw(view) {
    this.view = view;
    const {matrix, layout, stat, range, dark, width, gutter, path} = view;
    const rows = layout.rows, named = rows.length <= 64;
    const below = named ? 24 + Math.min(126, 5.2 * Math.max(4, ...rows.map((row) => shortName(row).length))) : 24;
    const height = 280 + below;
    const g = sizeCanvas(this.canvas, width, height);
    g.font = '11px system-ui, sans-serif';
    if (!matrix.count || !rows.length) return;
    const at = columnAt(matrix.steps, view.step === '' ? matrix.steps[matrix.count - 1] : view.step);
    this.values = rows.map((row) => displayValues(matrix, row, stat.combine)[at]);
    const box = {left: gutter, right: width - MARGIN, top: 22, bottom: height - below};
    const [low, high] = this.#range(range);
    const y = (v) => box.bottom - Math.min(1, Math.max(0.004, ((range.linear ? v : Math.log10(v)) - low) / (high - low))) * (box.bottom - box.top);
    this.#grid(g, box, low, high, range.linear);
    this.slot = (box.right - box.left) / rows.length;
    this.box = box;
    rows.forEach((row, i) => {
      const v = this.values[i], level = levelOf(v, range);
      const x = box.left + i * this.slot, w = Math.max(1, this.slot - (this.slot > 6 ? 2 : 0));
      const special = level === LEVELS + 2 ? NONFINITE : level === LEVELS ? ZERO : level === LEVELS + 1 ? missingColor(dark) : null;
      g.fillStyle = css(special || rgbAt(level / (LEVELS - 1)));
      const top = level === LEVELS + 2 ? box.top : special ? box.bottom - 4 : y(v);
      g.fillRect(x, top, w, box.bottom - top);
      if (row.path === path) {
        g.strokeStyle = cssColor('--gw-mark');
        g.lineWidth = 2;
        g.strokeRect(x - 1, top - 1, w + 2, box.bottom - top + 1);
      }
      if (named) this.#name(g, row, x + w / 2, box.bottom + 8);
    });
    g.fillStyle = cssColor('--gw-muted');
    g.textAlign = 'left';
    g.fillText(`${stat.label} at ${spanText(matrix, at)}`, box.left, 12);
    if (!named) g.fillText('input', box.left, height - 8);
    g.textAlign = 'right';
    if (!named) g.fillText('output', box.right, height - 8);
  }

  /** Room for all steps and runs on view, so that the axis stands still under the slider and side by side. */
  #range(range) {
    if (range.linear) return [0, 1];
    const low = Math.floor(range.least);
    return [low, Math.max(Math.ceil(range.most), low + 1)];
  }

  #grid(g, box, low, high, linear) {
    g.textAlign = 'right';
    const marks = linear ? [0, 0.25, 0.5, 0.75, 1] : [];
    const every = Math.max(1, Math.ceil((high - low) / 8));
    if (!linear) for (let e = low; e <= high; e += every) marks.push(e);
    for (const mark of marks) {
      const y = box.bottom - ((mark - low) / (high - low)) * (box.bottom - box.top);
      g.fillStyle = cssColor('--gw-grid');
      g.fillRect(box.left, y, box.right - box.left, 1);
      g.fillStyle = cssColor('--gw-muted');
      g.fillText(linear ? String(mark) : power(mark), box.left - 6, y + 4);
    }
  }

  #name(g, row, x, y) {
    g.save();
    g.translate(x, y);
    g.rotate(-Math.PI / 3.2);
    g.textAlign = 'right';
    g.fillStyle = cssColor('--gw-text');
    g.fillText(elide(g, shortName(row), 158), 0, 4);
    g.restore();
  }

  #rowAt(event) {
    if (!this.box || !this.view.layout.rows.length) return null;
    return this.view.layout.rows[Math.floor((event.offsetX - this.box.left) / this.slot)] || null;
  }

  #tooltip(event) {
    const row = this.#rowAt(event);
    this.tip.hidden = !row;
    if (!row) return;
    const value = this.values[this.view.layout.rows.indexOf(row)];
    clear(this.tip, el('b', {}, row.path || '(root)'), el('br'), value === -Infinity ? 'not measured' : `${this.view.stat.label} ${number(value)}`);
    const right = event.offsetX > this.canvas.clientWidth / 2;
    this.tip.style.left = right ? '' : `${event.offsetX + 14}px`;
    this.tip.style.right = right ? `${this.canvas.clientWidth - event.offsetX + 14}px` : '';
    this.tip.style.top = `${event.offsetY + 14}px`;
  }
}

function shortName(row) {
  return row.path.replace(/\.weight$/, '') || '(root)';
}
