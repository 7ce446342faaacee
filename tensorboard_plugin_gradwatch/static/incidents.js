// The table of incidents: when, which rule, where, how large, what was done, what to do.

import {breakable, clear, el, marked, number} from './dom.js';

const HEADS = ['step', 'rule', 'where it began', 'value', 'limit', 'treatment', 'what was seen, what to do'];

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
    el('td', {className: 'gw-num'}, limited(incident.value, incident.rule === 'non_finite')),
    el('td', {className: 'gw-num'}, limited(incident.limit)),
    el('td', {}, (incident.treatments || []).join(', ') || '–'),
    el('td', {className: 'gw-advice'}, el('div', {}, incident.message ? el('b', {}, incident.message) : null,
      incident.message && incident.advice ? ' ' : null, ...marked(incident.advice || ''))),
  ];
  if (several) cells.unshift(el('td', {}, run));
  row.append(...cells);
  return row;
}

function span(incident) {
  const {first_step: a, last_step: b} = incident;
  return b > a ? `${a}–${b}` : String(a);
}

/** NaN means that there is no such number, except where a rule looks for NaN. */
function limited(value, meant = false) {
  const text = number(value);
  return (text === 'NaN' && !meant) || text === '' ? '–' : text;
}

const WORST = {critical: 0, warning: 1, info: 2};

/** One line above the pictures: how many, how bad, what came first. `whole`: everything could be read. */
export function verdict(incidents, whole) {
  if (!incidents.length && !whole) return {className: 'gw-info', text: 'No incident is on record, but parts of this log can’t be read.'};
  if (!incidents.length) return {className: 'gw-healthy', text: 'Healthy: no rule has fired.'};
  const count = (severity) => incidents.filter((i) => i.severity === severity).length;
  const parts = ['critical', 'warning', 'info'].filter(count).map((s) => `${count(s)} ${s}`);
  const first = [...incidents].sort((a, b) => a.first_step - b.first_step || WORST[a.severity] - WORST[b.severity])[0];
  const plural = incidents.length === 1 ? 'incident' : 'incidents';
  const worst = count('critical') ? 'gw-critical' : count('warning') ? 'gw-warning' : 'gw-info';
  return {className: worst, first,
    text: `${incidents.length} ${plural} (${parts.join(', ')}). First: ${first.name || first.rule} at step ${first.first_step} in ${first.first_path || 'the whole model'}.`};
}
