// Keys, and the list of them.

import {el} from './dom.js';

const KEYS = [
  ['← →', 'step back, forward (with Shift: ten)'], ['↑ ↓', 'layer up, down'], ['n p', 'next, previous incident'],
  ['s', 'next statistic (S: previous)'], ['f', 'heatmap or gradient flow'], ['b', 'biases'], ['c', 'fold or unfold blocks'],
  ['/', 'filter'], ['0', 'whole run'], ['Esc', 'clear the choice'], ['?', 'these keys'],
];

/** The list of keys as a box that opens and closes. */
export function keyHelp() {
  const node = el('dl', {className: 'gw-help', hidden: true},
    ...KEYS.map(([keys, text]) => el('div', {}, el('dt', {}, ...keys.split(' ').map((k) => el('kbd', {}, k))), el('dd', {}, text))));
  return {node, toggle: () => (node.hidden = !node.hidden)};
}

export function bindKeys(app) {
  const actions = {
    ArrowLeft: (e) => app.move(e.shiftKey ? -10 : -1, 0), ArrowRight: (e) => app.move(e.shiftKey ? 10 : 1, 0),
    ArrowUp: () => app.move(0, -1), ArrowDown: () => app.move(0, 1),
    n: () => app.nextIncident(1), p: () => app.nextIncident(-1), s: () => app.nextStatistic(1), S: () => app.nextStatistic(-1),
    f: () => app.change({view: app.state.view === 'flow' ? 'map' : 'flow'}), b: () => app.change({biases: !app.state.biases}),
    c: () => app.foldAll(), 0: () => app.change({from: '', to: ''}, true), '?': () => app.help.toggle(), '/': () => app.filter.focus(),
    Escape: () => {
      document.activeElement?.blur();
      app.select('', '');
    },
  };
  document.addEventListener('keydown', (event) => {
    const typing = event.target.matches?.('input:not([type=range]):not([type=checkbox]), select, textarea');
    if (event.ctrlKey || event.metaKey || event.altKey || (typing && event.key !== 'Escape') || !app.panels.length) return;
    if (event.target.type === 'range' && event.key.startsWith('Arrow')) return;
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    action(event);
  });
}
