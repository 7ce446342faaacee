// What is on view, as one flat object that fits into a link.

export const START = {run: '', other: '', stat: 'grad_norm', step: '', path: '', filter: '', biases: false, view: 'map',
  from: '', to: '', folded: ''};

/** State from "run=a&stat=b", with `prefix` before every name. Unknown names are left alone. */
export function parse(text, prefix = '') {
  const state = {...START};
  for (const pair of text.replace(/^#/, '').split('&')) {
    const cut = pair.indexOf('=');
    const name = pair.slice(0, cut);
    if (cut < 0 || !name.startsWith(prefix) || !(name.slice(prefix.length) in START)) continue;
    let value;
    try {
      value = decodeURIComponent(pair.slice(cut + 1));
    } catch {
      continue;
    }
    const key = name.slice(prefix.length);
    if (key === 'biases') state.biases = value === '1';
    else if (['step', 'from', 'to'].includes(key)) state[key] = value !== '' && Number.isFinite(Number(value)) ? Number(value) : '';
    else state[key] = value;
  }
  return state;
}

/** The hash with this state in it; what belongs to others stays. */
export function format(state, prefix = '', hash = '') {
  const others = hash.replace(/^#/, '').split('&').filter((pair) => {
    const name = pair.split('=')[0];
    return pair && !(name.startsWith(prefix) && name.slice(prefix.length) in START);
  });
  const mine = Object.keys(START).filter((key) => state[key] !== START[key])
    .map((key) => `${prefix}${key}=${encodeURIComponent(state[key] === true ? '1' : state[key])}`);
  return '#' + [...others, ...mine].join('&');
}

/** Names of runs: a comma between them, each escaped where it must be. A single one may stand as it is. */
export function listed(text) {
  return text.split(',').filter(Boolean).map((part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  });
}

export function listText(names) {
  return names.map((name) => name.replaceAll('%', '%25').replaceAll(',', '%2C')).join(',');
}

/** The blocks that are folded: a comma between names, each escaped. */
export function foldedSet(state) {
  const names = new Set();
  for (const part of state.folded.split(',').filter(Boolean)) {
    try {
      names.add(decodeURIComponent(part));
    } catch {
      continue; // a link that was cut off
    }
  }
  return names;
}

export function foldedText(set) {
  return [...set].map(encodeURIComponent).join(',');
}
