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
    el('td', {}, (incident.treatments || []).join(', ') || '–'),
    el('td', {className: 'gw-advice'}, el('div', {}, incident.message ? el('b', {}, incident.message) : null,
      incident.message && incident.advice ? ' ' : null, ...marked(incident.advice || '')), entry === chosen ? caseFile(incident) : null),
  ];
  if (several) cells.unshift(el('td', {}, run));
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

/** Which path the value is of, where it is not the one it began in. */
function elsewhere({worst_path: path, first_path: first, value}) {
  if (path === undefined || path === null || path === first || !Number.isFinite(value)) return null;
  return path ? el('small', {title: path}, ...breakable(path)) : el('small', {}, 'whole model');
}

/** NaN means that there is no such number, except where a rule looks for NaN. */
function limited(value, meant = false) {
  const text = number(value);
  return (text === 'NaN' && !meant) || text === '' ? '–' : text;
}

/** One line above the pictures: what is said of each run, and what to look at first. `told`: [{run, verdict}]. */
export function verdict(entries, told, whole) {
  const said = told.filter((t) => t.verdict);
  if (!said.length) return {className: 'gw-info', text: whole ? 'Nothing can be said of this log.' : 'Parts of this log can’t be read.'};
  const ill = said.filter((t) => t.verdict.tone === 'bad').length;
  const unseen = said.filter((t) => t.verdict.tone === 'unseen').length;
  const worst = entries.some((e) => e.incident.severity === 'critical') ? 'gw-critical' : 'gw-warning';
  const text = said.map((t) => (said.length > 1 ? `${t.run}: ${t.verdict.headline}` : t.verdict.headline)).join(' ');
  return {className: ill ? worst : unseen || !whole ? 'gw-info' : 'gw-good', first: leading(entries, said),
    text: whole ? text : `${text} Parts of this log can’t be read.`};
}

/** The incident that the first of the verdicts with one names. */
function leading(entries, said) {
  for (const {run, verdict: {first}} of said) {
    const found = first && entries.find((e) => e.run === run && e.incident.rule === first[0] && e.incident.first_step === first[1]
      && e.incident.id === first[2]);
    if (found) return found;
  }
  return entries[0];
}
