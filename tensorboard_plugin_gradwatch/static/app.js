// The page: toolbar, pictures, detail, incidents. Used by the TensorBoard tab and by the report alike.

import {css, missingColor, rangeOf, rgbAt, NONFINITE, ZERO} from './colors.js';
import {Detail, Tasks, emptyNote} from './detail.js';
import {clear, el, keep, number, power} from './dom.js';
import {incidentTable, verdict} from './incidents.js';
import {bindKeys, keyHelp} from './keys.js';
import {columnAt, displayValues, spanText} from './matrix.js';
import {Over} from './over.js';
import {Panel} from './panel.js';
import {rowOf} from './rows.js';
import {foldedSet, foldedText, listed, listText} from './state.js';
import {describe, sortStatistics} from './statistics.js';

/** Runs on view at once. */
const MOST_RUNS = 6;
/** Width of a printed page: A4 without its margins. */
const PAPER = 700;

export class App {
  /**
   * @param {HTMLElement} root where the page goes.
   * @param {object} source `runs()`, `run(id)`, `matrix(id, statistic, {from, to, path})`, `headline(id, {from, to})`,
   *   `scalars(id)`, `incidents(id)`, `histograms(id, path)`, each a promise.
   * @param {object} view {read(): state, write(state), dark(): boolean}.
   */
  constructor(root, source, view) {
    Object.assign(this, {root, source, view, state: view.read(), runs: [], panels: [], asked: 0});
    const on = {
      select: (step, row) => this.select(step, row?.path), zoom: (from, to) => this.change({from, to}, true),
      fold: (block) => this.fold(block), incident: (incident) => this.goTo(incident),
    };
    this.pool = [];
    this.on = on;
    this.over = new Over(on);
    this.detail = new Detail(source, on);
    this.tasks = new Tasks(on);
    this.#build();
    bindKeys(this);
  }

  /** Read the runs again and everything on view; what is on view stays. */
  async reload() {
    try {
      this.runs = (await this.source.runs()).runs;
    } catch (problem) {
      return this.#blank(`The list of runs can't be read: ${problem.message}`);
    }
    const readable = this.runs.filter((r) => !r.message);
    this.#options(this.runSelect, this.runs.map((r) => [r.id, r.id + (r.message ? ' (unreadable)' : '')]));
    this.otherSelect.parentElement.hidden = readable.length < 2;
    this.runSelect.parentElement.hidden = this.verdict.hidden = Boolean(this.source.single);
    if (!this.runs.length) {
      return this.#blank('There are no gradwatch data here yet. Add GradWatch() to the Trainer’s callbacks, or '
        + 'TensorBoardSink to a Watch, and train: the first points appear after the first logged step.');
    }
    if (!this.runs.some((r) => r.id === this.state.run)) this.state.run = newest(readable.length ? readable : this.runs).id;
    this.readable = readable.map((r) => r.id);
    this.#options(this.otherSelect, [['', '–'], ...readable.map((r) => [r.id, r.id])]);
    this.state.other = listText(listed(this.state.other).filter((id) => this.readable.includes(id)));
    return this.load();
  }

  /** Fetch the chosen runs, statistic and steps, then draw. An older answer that arrives late is dropped. */
  async load() {
    const ask = (this.asked += 1), {state} = this;
    const ids = [...new Set([state.run, ...listed(state.other)])].slice(0, MOST_RUNS);
    const found = await Promise.all(ids.map((id) => this.#fetch(id)));
    if (ask !== this.asked) return;
    this.panels = found.map((data, i) => {
      this.pool[i] ??= new Panel(this.on);
      this.pool[i].load(data);
      return this.pool[i];
    });
    this.draw();
    this.#later(ask);
  }

  /** What can wait until the rest is on view: scalars, for the cosines between tasks. */
  async #later(ask) {
    const {data} = this.panels[0];
    if (data.info) data.scalars = await this.source.scalars(data.id).catch(() => null);
    if (ask === this.asked) this.tasks.draw({panels: this.panels, state: this.state, width: this.full});
  }

  async #fetch(id) {
    const listed = this.runs.find((r) => r.id === id);
    const data = {id, info: null, matrix: null, headline: null, incidents: [], over: 'parameter', error: listed?.message || ''};
    if (data.error) return data;
    try {
      const info = await this.source.run(id), {from, to} = this.state;
      const names = sortStatistics(Object.keys(info.statistics));
      if (!names.includes(this.state.stat) && names.length && id === this.state.run) this.state.stat = names[0];
      const known = names.includes(this.state.stat);
      const [matrix, headline, incidents] = await Promise.all([
        known ? this.source.matrix(id, this.state.stat, {from, to}).catch((p) => note(data, p)) : null,
        this.source.headline(id, {from, to}).catch((p) => note(data, p)),
        this.source.incidents(id).catch((p) => note(data, p)),
      ]);
      Object.assign(data, {info, matrix, headline, incidents: incidents?.incidents || [], verdict: incidents?.verdict, stamp: info.stamp});
      if (known) data.over = info.statistics[this.state.stat].over;
      data.error = [data.error, ...(info.notes || [])].filter(Boolean).join(' ');
    } catch (problem) {
      note(data, problem);
    }
    return data;
  }

  draw() {
    // Paper is white, whatever the screen is.
    const {state, panels} = this, dark = this.view.dark() && !this.printing;
    document.body.classList.toggle('gw-dark', dark);
    const about = Object.assign({}, ...panels.map((p) => p.data.info?.statistics || {}));
    const stat = (this.stat = describe(state.stat, about[state.stat]?.about));
    this.runSelect.value = state.run;
    this.#others();
    this.#options(this.statSelect, sortStatistics(Object.keys(about)).map((n) => [n, describe(n, about[n].about).label]));
    this.statSelect.value = state.stat;
    this.statSelect.title = stat.help;
    if (document.activeElement !== this.filter) this.filter.value = state.filter;
    this.biases.checked = state.biases;
    for (const button of this.views.children) button.setAttribute('aria-pressed', String(button.dataset.view === state.view));
    this.resetZoom.hidden = state.from === '' && state.to === '';
    const full = (this.full = this.printing ? PAPER : Math.max(280, this.root.clientWidth - 32));
    const beside = panels.length === 2 && full >= 1100;
    const width = beside ? Math.floor((full - 24) / 2) : full;
    const gutter = gutterOf(width);
    this.panelsBox.classList.toggle('gw-beside', beside);
    const range = (this.range = rangeOf(panels.flatMap((p) => p.displayed(state, stat, foldedSet(state))), stat.linear));
    this.over.draw({panels, stat, state, width: full, gutter: gutterOf(full)});
    keep(this.panelsBox, ...panels.map((p) => p.root));
    for (const panel of panels) panel.draw({state, stat, range, dark, width, gutter, folded: foldedSet(state), titled: panels.length > 1});
    this.#legend(range, dark, stat);
    this.#said();
    this.#slider();
    this.#cell();
    this.tasks.draw({panels, state, width: full});
    this.#showDetail(full);
    this.empty.hidden = true;
    this.main.hidden = false;
    this.view.write(state);
  }

  change(part, fetch = false) {
    Object.assign(this.state, part);
    return fetch ? this.load() : this.draw();
  }

  /** Choose a step and, where given, a path. */
  select(step, path) {
    if (step !== undefined && step !== null) this.state.step = step;
    if (path !== undefined) this.state.path = path;
    for (const panel of this.panels) panel.mark(this.state);
    this.over.mark(this.state.step);
    this.#slider();
    this.#cell();
    this.#showDetail(this.full);
    this.view.write(this.state);
  }

  fold(block) {
    const folded = foldedSet(this.state);
    if (!folded.delete(block)) folded.add(block);
    this.change({folded: foldedText(folded)});
  }

  foldAll() {
    const blocks = new Set(this.panels.flatMap((p) => p.layout.blocks.map((b) => b.name)));
    this.change({folded: this.state.folded ? '' : foldedText(blocks)});
  }

  /** Move the view to an incident: its column, its row, zoomed out where it lies outside. */
  async goTo(incident, run = null) {
    const {state, panels} = this;
    const panel = panels.find((p) => p.data.id === run) || panels.find((p) => p.data.incidents.includes(incident)) || panels[0];
    this.incident = incident;
    const [low, high] = panel.span(state);
    state.step = incident.first_step;
    const row = rowOf(panel.layout, incident.first_path);
    state.path = row ? row.path : incident.first_path || state.path;
    if (incident.first_step < low || incident.first_step > high) await this.change({from: '', to: ''}, true);
    else this.draw();
    this.panelsBox.scrollIntoView({block: 'nearest', behavior: 'smooth'});
  }

  /** Move by rows and columns of the first panel. */
  move(columns, rows) {
    const panel = this.panels[0], {state} = this;
    if (!panel?.data.matrix?.count) return;
    const {steps, count} = panel.data.matrix;
    const at = state.step === '' ? count - 1 : columnAt(steps, state.step);
    const next = Math.min(count - 1, Math.max(0, at + columns));
    const list = panel.layout.rows, row = list.findIndex((r) => r.path === state.path);
    const path = rows && list.length ? list[Math.min(list.length - 1, Math.max(0, row < 0 ? 0 : row + rows))].path : undefined;
    this.select(steps[next], path);
  }

  nextIncident(direction) {
    const all = this.entries();
    if (!all.length) return;
    const at = all.findIndex((e) => isSame(e.incident, this.incident));
    const next = at < 0 ? all[direction > 0 ? 0 : all.length - 1] : all[(at + direction + all.length) % all.length];
    this.goTo(next.incident, next.run);
  }

  nextStatistic(direction) {
    const {options, selectedIndex} = this.statSelect;
    if (options.length) this.#chooseStatistic(options[(selectedIndex + direction + options.length) % options.length].value);
  }

  /** Incidents of the runs on view, run by run, each behind what it follows from. */
  entries() {
    return this.panels.flatMap((p) => p.data.incidents.map((incident) => ({incident, run: p.data.id})));
  }

  /** Keep the layer where a parameter statistic gives way to a module one, and the reverse. */
  async #chooseStatistic(stat) {
    this.state.stat = stat;
    await this.load();
    const panel = this.panels[0], path = this.state.path;
    if (path && panel?.paths?.length && !panel.paths.some((p) => p.path === path)) {
      const row = rowOf(panel.layout, path);
      this.select(null, row ? row.path : '');
    }
  }

  #said() {
    const entries = this.entries(), said = verdict(entries,
      this.panels.map((p) => ({run: p.data.id, verdict: p.data.verdict})), this.panels.every((p) => !p.data.error));
    const unread = this.panels.length && this.panels.every((p) => !p.data.info);
    this.verdict.className = `gw-verdict ${unread ? 'gw-info' : said.className}`;
    const several = said.lines.length > 1;
    clear(this.verdict, ...(unread ? ['This run can’t be shown; the reason is below.'] : said.lines.map(({run, text, className, first}) => el('div', {className},
      several ? el('span', {className: 'gw-dot'}) : null, run ? el('b', {}, `${run}: `) : null, text,
      first ? el('button', {type: 'button', onclick: () => this.goTo(first.incident, first.run)}, 'Show it') : null))));
    incidentTable(this.table, entries, {several: this.panels.length > 1,
      chosen: entries.find((e) => isSame(e.incident, this.incident)), onChoose: (e) => this.goTo(e.incident, e.run)});
  }

  #showDetail(width) {
    this.detail.show(this.state.path, {panels: this.panels.filter((p) => p.data.matrix), stat: this.stat, state: this.state, width});
  }

  #slider() {
    const matrix = this.panels.find((p) => p.data.matrix?.count)?.data.matrix;
    this.stepBox.hidden = !matrix;
    if (!matrix) return;
    this.slider.max = String(matrix.count - 1);
    const at = this.state.step === '' ? matrix.count - 1 : columnAt(matrix.steps, this.state.step);
    this.slider.value = String(at);
    this.stepText.textContent = spanText(matrix, at);
  }

  /** The chosen cell in words, for whoever walks over the picture by keys and for screen readers. */
  #cell() {
    const panel = this.panels[0], {state} = this, row = panel?.layout?.rows.find((r) => r.path === state.path);
    const {matrix} = panel?.data || {};
    if (!row || !matrix?.count || state.step === '') return void (this.cellText.textContent = '');
    const at = columnAt(matrix.steps, state.step), value = displayValues(matrix, row, this.stat.combine)[at];
    this.cellText.textContent = `${row.path || '(root)'}, ${spanText(matrix, at)}: ${value === -Infinity ? 'not measured' : number(value)}`;
  }

  /** The runs beside the first: one by the list, more by a box for each. */
  #others() {
    const chosen = listed(this.state.other), others = (this.readable || []).filter((id) => id !== this.state.run);
    this.otherSelect.value = chosen.find((id) => id !== this.state.run) || '';
    this.more.hidden = others.length < 2;
    const shown = others.map((id) => id + (chosen.includes(id) ? '+' : '')).join('\n');
    if (shown === this.shownOthers) return;
    this.shownOthers = shown;
    const toggle = (id, on) => this.change({other: listText(on ? [...chosen, id] : chosen.filter((other) => other !== id)), from: '', to: ''}, true);
    clear(this.moreList, ...others.map((id) => el('label', {}, el('input', {type: 'checkbox', checked: chosen.includes(id),
      disabled: !chosen.includes(id) && chosen.length + 1 >= MOST_RUNS, onchange: (event) => toggle(id, event.target.checked)}), id)));
  }

  #legend(range, dark, stat) {
    const bar = el('span', {className: 'gw-ramp', style: {background: `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map((t) => css(rgbAt(t))).join(',')})`}});
    const end = (v) => (range.linear ? number(v) : number(Number((10 ** v).toPrecision(2))));
    const key = (rgb, text) => el('span', {className: 'gw-key'}, el('i', {style: {background: css(rgb)}}), text);
    clear(this.legend, el('span', {}, `${stat.label} `), end(range.low), bar, end(range.high),
      range.linear ? null : key(ZERO, 'zero'), key(missingColor(dark), 'not measured'), key(NONFINITE, 'NaN or ∞'),
      stat.guide ? el('span', {}, `guide ${power(Math.log10(stat.guide))}`) : null);
  }

  #options(select, pairs) {
    const same = select.options.length === pairs.length && pairs.every(([v, t], i) => select.options[i].value === v && select.options[i].text === t);
    if (!same) clear(select, ...pairs.map(([value, text]) => el('option', {value}, text)));
  }

  #blank(text) {
    this.main.hidden = true;
    this.empty.hidden = false;
    document.body.classList.toggle('gw-dark', this.view.dark());
    emptyNote(this.empty, text);
  }

  #build() {
    const labelled = (text, control) => el('label', {className: 'gw-field'}, el('span', {}, text), control);
    const button = (text, title, onclick, more = {}) => el('button', {type: 'button', title, onclick, ...more}, text);
    this.runSelect = el('select', {id: 'gw-run', onchange: () => this.change({run: this.runSelect.value, from: '', to: ''}, true)});
    this.otherSelect = el('select', {id: 'gw-other', onchange: () => this.change({other: listText([this.otherSelect.value].filter(Boolean)), from: '', to: ''}, true)});
    this.moreList = el('div', {className: 'gw-more-list'});
    this.more = el('details', {className: 'gw-more', hidden: true}, el('summary', {title: `More runs over each other, ${MOST_RUNS} at most`}, 'more'), this.moreList);
    this.statSelect = el('select', {id: 'gw-stat', onchange: () => this.#chooseStatistic(this.statSelect.value)});
    this.filter = el('input', {id: 'gw-filter', type: 'search', placeholder: 'e.g. attn or h.1*', oninput: () => this.change({filter: this.filter.value})});
    this.biases = el('input', {id: 'gw-biases', type: 'checkbox', onchange: () => this.change({biases: this.biases.checked})});
    this.views = el('div', {className: 'gw-views', role: 'group', 'aria-label': 'Picture'},
      button('Heatmap', 'Paths by steps', () => this.change({view: 'map'}), {data: {view: 'map'}}),
      button('Gradient flow', 'One bar per layer at one step (f)', () => this.change({view: 'flow'}), {data: {view: 'flow'}}));
    this.slider = el('input', {type: 'range', min: '0', 'aria-label': 'Step', oninput: () => {
      const matrix = this.panels.find((p) => p.data.matrix?.count).data.matrix;
      this.select(matrix.steps[Number(this.slider.value)]);
    }});
    this.stepText = el('output');
    this.cellText = el('output', {className: 'gw-cell', 'aria-live': 'polite'});
    this.stepBox = el('div', {className: 'gw-step'}, this.slider, this.stepText, this.cellText);
    this.resetZoom = button('Whole run', 'Show all steps again (double click)', () => this.change({from: '', to: ''}, true), {className: 'gw-reset'});
    this.help = keyHelp();
    this.legend = el('div', {className: 'gw-legend'});
    this.verdict = el('div', {className: 'gw-verdict', role: 'status'});
    this.panelsBox = el('div', {className: 'gw-panels'});
    this.table = el('div', {className: 'gw-incidents'});
    this.empty = el('div', {hidden: true});
    this.main = el('main', {hidden: true},
      el('header', {className: 'gw-bar'}, labelled('Run', this.runSelect), labelled('beside', this.otherSelect), this.more, labelled('Statistic', this.statSelect),
        labelled('Filter', this.filter), el('label', {className: 'gw-check', title: 'Biases and other one-dimensional parameters (b)'}, this.biases, 'biases'),
        button('Fold', 'Fold or unfold all blocks (c)', () => this.foldAll()), button('?', 'Keys', () => this.help.toggle())),
      this.help.node, this.verdict, el('div', {className: 'gw-tools'}, this.views, this.stepBox, this.resetZoom, this.legend), this.over.root, this.panelsBox,
      el('section', {}, el('h2', {}, 'Incidents'), this.table), this.detail.root, this.tasks.root);
    this.root.classList.add('gw-root');
    clear(this.root, this.empty, this.main);
    const print = (printing) => {
      this.printing = printing;
      if (this.panels.length) this.draw();
    };
    window.addEventListener('beforeprint', () => print(true));
    window.addEventListener('afterprint', () => print(false));
    let timer = 0;
    window.addEventListener('resize', () => {
      clearTimeout(timer);
      timer = setTimeout(() => this.panels.length && this.draw(), 80);
    });
  }
}

/** Room for names of rows, left of the pictures. */
function gutterOf(width) {
  return Math.round(Math.min(230, Math.max(Math.min(150, 0.27 * width), 0.2 * width)));
}

/** The run that was written to last. */
function newest(runs) {
  return runs.reduce((best, run) => ((run.last_time || 0) > (best.last_time || 0) ? run : best));
}

function note(data, problem) {
  data.error = [data.error, problem.message].filter(Boolean).join(' ');
  return null;
}

/** One incident, read twice. */
function isSame(a, b) {
  return Boolean(a && b) && a.id === b.id && a.rule === b.rule && a.first_step === b.first_step;
}
