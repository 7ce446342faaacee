// One run: its global norm, and below it the heatmap or the flow picture.

import {clear, cssColor, el, keep} from './dom.js';
import {Flow} from './flow.js';
import {Heatmap} from './heatmap.js';
import {LineChart, isLinear} from './lines.js';
import {displayValues, extent, rowValues, scalarColumn} from './matrix.js';
import {layoutRows, pathsOf} from './rows.js';

const ROOM = 480;

export class Panel {
  constructor(on) {
    this.on = on;
    this.title = el('h2');
    this.lossBox = el('div', {className: 'gw-loss'});
    this.loss = new LineChart(this.lossBox);
    this.normBox = el('div', {className: 'gw-norm'});
    this.norm = new LineChart(this.normBox);
    this.heat = new Heatmap(on);
    this.flow = new Flow(on);
    this.note = el('p', {className: 'gw-quiet'});
    this.problem = el('p', {className: 'gw-problem', role: 'alert'});
    this.picture = el('div', {className: 'gw-picture'});
    this.root = el('section', {className: 'gw-panel'}, this.title, this.problem, this.lossBox, this.normBox, this.note, this.picture);
  }

  /** `data`: {info, matrix, headline, incidents, over, error}. */
  load(data) {
    this.data = data;
    this.paths = data.matrix ? pathsOf(data.info.index, data.over) : [];
    if (data.matrix && this.paths.length !== data.matrix.rows) this.paths = [];
    // Modules that never ran have nothing to show; a parameter without a gradient is worth a row.
    const listed = this.paths.length, always = data.matrix && !data.matrix.partial;
    this.paths = this.paths.filter((p) => (p.parameter && always) || rowValues(data.matrix, p.place).some((v) => v !== -Infinity));
    const unseen = listed - this.paths.length;
    this.unseen = !unseen ? '' : always ? `${unseen} modules without a measurement (never called by themselves) are left out.`
      : `${unseen} rows (biases, and what was not measured) are left out to keep this file small.`;
  }

  /** The values of the rows as they are drawn, a folded block's as one: what the colours span. */
  displayed(state, stat, folded) {
    if (!this.data.matrix || !this.paths.length) return [];
    const {rows} = layoutRows(this.paths, {filter: '', biases: state.biases, folded}, ROOM);
    return rows.map((row) => displayValues(this.data.matrix, row, stat.combine));
  }

  draw({state, stat, range, dark, width, gutter, folded, titled}) {
    const {data} = this;
    clear(this.title, titled ? data.id : '');
    this.title.hidden = !titled;
    const said = [];
    this.problem.textContent = [data.error, data.matrix?.left_out ? `${data.matrix.left_out} damaged or foreign points were left out.` : '']
      .filter(Boolean).join(' ');
    this.#loss({state, width, gutter});
    this.#norm({state, width, gutter});
    if (!data.matrix || !this.paths.length) {
      this.note.textContent = data.error ? '' : `This run has no “${stat.label}”.`;
      this.picture.replaceChildren();
      this.layout = {rows: [], blocks: [], height: 0};
      return;
    }
    this.layout = layoutRows(this.paths, {filter: state.filter, biases: state.biases, folded}, ROOM);
    if (!this.layout.rows.length) said.push('No path matches the filter.');
    if (!data.matrix.count) said.push('No measurement in these steps yet.');
    else if (this.unseen) said.push(this.unseen);
    this.note.textContent = said.join(' ');
    const view = {matrix: data.matrix, span: this.span(state), layout: this.layout, stat, range, dark, width, gutter,
      incidents: data.incidents, step: state.step, path: state.path};
    if (state.view === 'flow') {
      keep(this.picture, this.flow.root);
      this.flow.draw(view);
    } else {
      keep(this.picture, this.heat.root);
      this.heat.step = state.step;
      this.heat.path = state.path;
      this.heat.draw(view);
    }
  }

  mark(state) {
    this.loss.mark(state.step);
    this.norm.mark(state.step);
    if (state.view === 'flow' && this.flow.view) this.flow.draw({...this.flow.view, step: state.step, path: state.path});
    else this.heat.mark(state.step, state.path);
  }

  /**
   * The steps on view, of curves and heatmap alike, so that a curve lies over its columns: a statistic that is measured now and then
   * ends before the run does.
   */
  span(state) {
    const {matrix, headline} = this.data, steps = headline?.steps || [];
    if (matrix?.count) {
      const whole = state.from === '' && state.to === '' && steps.length;
      const [low, high] = extent(matrix, whole ? steps[steps.length - 1] : null);
      return whole ? [Math.min(low, steps[0]), Math.max(high, steps[steps.length - 1] + 1)] : [low, high];
    }
    return [state.from === '' ? (steps[0] ?? 0) : state.from, state.to === '' ? (steps[steps.length - 1] ?? 1) : state.to];
  }

  /** The loss, over the same columns as all below it. */
  #loss({state, width, gutter}) {
    const {headline, incidents} = this.data;
    const values = headline && scalarColumn(headline, 'loss');
    // One that was NaN throughout is a loss, too.
    this.lossBox.hidden = !values || !values.some((v) => v !== -Infinity);
    if (this.lossBox.hidden) return;
    const [low, high] = this.span(state);
    const linear = isLinear([values]);
    this.loss.draw({steps: headline.steps, series: [{label: 'loss', values, color: cssColor('--gw-line-1')}], width, height: 120,
      gutter, linear, incidents, low, high, step: state.step, on: {zoom: this.on.zoom, step: (step) => this.on.select(step, null)}});
  }

  #norm({state, width, gutter}) {
    const {headline, incidents} = this.data;
    const [low, high] = this.span(state);
    const before = headline && scalarColumn(headline, 'global_norm');
    this.normBox.hidden = !before;
    if (!before) return;
    const after = scalarColumn(headline, 'global_norm_after');
    const limit = scalarColumn(headline, 'limit'), most = scalarColumn(headline, 'global_norm_max');
    const series = [];
    if (most && differs(most, before)) series.push({label: 'largest since the last point', values: most, color: cssColor('--gw-faint'), width: 1});
    series.push({label: 'global norm before treatment', values: before, color: cssColor('--gw-produced')});
    if (after && differs(after, before)) series.push({label: 'after treatment', values: after, color: cssColor('--gw-treated'), apartFrom: before});
    const applied = scalarColumn(headline, 'global_norm_applied');
    if (applied && differs(applied, after || before)) {
      series.push({label: 'as the optimizer got it', values: applied, color: cssColor('--gw-applied'), apartFrom: after || before});
    }
    // Event files, whose points are windows of steps, hold one number for both, the smaller.
    const clip = scalarColumn(headline, 'clip_limit');
    const name = scalarColumn(headline, 'window') ? 'a rule’s bar, a clip’s limit' : 'the alarm’s bar';
    if (isSeen(limit)) series.push({label: name, values: limit, color: cssColor('--gw-alarm'), width: 1, dash: [6, 4]});
    if (isSeen(clip)) series.push({label: 'a clip’s limit', values: clip, color: cssColor('--gw-limit'), width: 1.5, dash: [2, 3]});
    this.norm.draw({steps: headline.steps, series, width, height: 190, gutter, incidents, low, high, step: state.step,
      on: {zoom: this.on.zoom, step: (step) => this.on.select(step, null)}});
  }
}

function isSeen(values) {
  return Boolean(values) && values.some((v) => Number.isFinite(v));
}

function differs(a, b) {
  for (let i = 0; i < a.length; i++) {
    if (Number.isFinite(a[i]) && Number.isFinite(b[i]) && Math.abs(a[i] - b[i]) > 1e-6 * Math.abs(b[i])) return true;
  }
  return false;
}
