// The table of incidents: when, which rule, where, how large, what was done, what to do.

import {breakable, clear, el, marked, number} from './dom.js';

const HEADS = ['step', 'rule', 'where it began', 'value', 'bar', 'treatment', 'what was seen, what to do'];

/**
 * Fill `place` with a table.
 * @param {Array<{run: string, incident: object}>} entries in order of their first step.
 * @param {object} options {several, chosen, onChoose}.
 */
export function incidentTable(place, entries, {several, chosen, onChoose}) {
  if (!entries.length) {
    clear(place, el('p', {className: 'gw-quiet'}, 'No rule has fired.'));
    return;
  }
  const heads = several ? ['run', ...HEADS] : HEADS;
  const table = el('table', {className: 'gw-table'},
    el('thead', {}, el('tr', {}, ...heads.map((head) => el('th', {}, head)))),
    el('tbody', {}, ...entries.map((entry) => line(entry, {several, chosen, onChoose}))));
  clear(place, el('div', {className: 'gw-scroll'}, table));
}

function line(entry, {several, chosen, onChoose}) {
  const {incident, run} = entry;
  const row = el('tr', {
    className: `gw-line gw-${incident.severity}${entry === chosen ? ' gw-current' : ''}`, tabIndex: 0, role: 'button',
    data: {id: String(incident.id ?? ''), step: String(incident.first_step)},
    onclick: () => onChoose(entry),
    onkeydown: (event) => {
      if (event.key === 'Enter' || event.key === ' ') {
        event.preventDefault();
        onChoose(entry);
      }
    },
  });
  const where = incident.first_path || 'whole model';
  const more = (incident.num_paths ?? (incident.paths || []).length) - 1;
  const cells = [
    el('td', {className: 'gw-num'}, span(incident), el('small', {}, incident.resolved ? 'over' : 'still on')),
    el('td', {className: 'gw-rule'}, el('span', {className: 'gw-dot'}), incident.name || incident.rule),
    el('td', {className: 'gw-path', title: (incident.paths || []).join('\n')}, ...breakable(where), more > 0 ? el('small', {}, `and ${more} more`) : null),
    el('td', {className: 'gw-num'}, limited(incident.value, incident.rule === 'non_finite'), elsewhere(incident)),
    el('td', {className: 'gw-num'}, limited(incident.limit)),
    el('td', {className: incident.treatments?.length ? '' : 'gw-none'}, (incident.treatments || []).join(', ') || '–'),
    el('td', {className: 'gw-advice'}, el('div', {}, incident.message ? el('b', {}, incident.message) : null,
      incident.message && incident.advice ? ' ' : null, ...marked(incident.advice || '')), entry === chosen ? caseFile(incident) : null),
  ];
  if (several) cells.unshift(el('td', {}, run));
  const heads = several ? ['run', ...HEADS] : HEADS;
  cells.forEach((cell, i) => (cell.dataset.head = heads[i]));
  row.append(...cells);
  return row;
}

/** What the case file says, of the chosen incident. */
function caseFile(incident) {
  if (!incident.case?.length) return null;
  return el('dl', {className: 'gw-case'}, ...incident.case.flatMap(([head, text]) => [el('dt', {}, head), el('dd', {}, text)]));
}

function span(incident) {
  const {first_step: a, last_step: b} = incident;
  return b > a ? `${a}–${b}` : String(a);
}

/** Which path and step the value is of, where they are not those it began at. */
function elsewhere({worst_path: path, first_path: first, worst_step: step, first_step: began, value}) {
  if (!Number.isFinite(value)) return null;
  const where = path === undefined || path === null || path === first ? null : path || 'whole model';
  const when = step === undefined || step === null || step === began ? '' : `at step ${step}`;
  if (where === null && !when) return null;
  return el('small', {title: where || ''}, ...(where === null ? [] : breakable(where)), where !== null && when ? ' ' : null, when);
}

/** NaN means that there is no such number, except where a rule looks for NaN. */
function limited(value, meant = false) {
  const text = number(value);
  return (text === 'NaN' && !meant) || text === '' ? '–' : text;
}

/**
 * What stands above the pictures: what is said of each run, on a line of its own, and what to look at first. `told`: [{run, verdict}].
 * @returns {{className: string, lines: {run: string, text: string, className: string, first: object}[]}}
 */
export function verdict(entries, told, whole) {
  const said = told.filter((t) => t.verdict), unread = 'Parts of this log can’t be read.';
  const alone = (text) => ({className: 'gw-info', lines: [{run: '', text, className: 'gw-info'}]});
  if (!said.length) return alone(whole ? 'Nothing can be said of this log.' : unread);
  const lines = said.map((one) => ({run: said.length > 1 ? one.run : '', text: one.verdict.headline,
    className: toneOf(one, entries), first: leading(entries, one)}));
  if (!whole) lines.push({...alone(unread).lines[0]});
  const tones = lines.map((one) => one.className);
  return {className: TONES.find((tone) => tones.includes(tone)), lines};
}

const TONES = ['gw-critical', 'gw-warning', 'gw-info', 'gw-good'];

function toneOf({run, verdict: {tone}}, entries) {
  if (tone !== 'bad') return tone === 'unseen' ? 'gw-info' : 'gw-good';
  return entries.some((e) => e.run === run && e.incident.severity === 'critical') ? 'gw-critical' : 'gw-warning';
}

/** The incident that a run's verdict names; its first where it names none. */
function leading(entries, {run, verdict: {first}}) {
  const own = entries.filter((e) => e.run === run);
  const named = first && own.find(({incident: i}) => i.rule === first[0] && i.first_step === first[1] && i.id === first[2]);
  return named || own[0];
}
