// The page of `gradwatch serve`: the tab without TensorBoard around it.

import {App} from './app.js';
import {el} from './dom.js';
import {source, stylesheet} from './remote.js';
import {format, parse} from './state.js';

const APART = 5000; // milliseconds between two looks for what is new

async function start() {
  const system = window.matchMedia('(prefers-color-scheme: dark)');
  const view = {
    read: () => parse(location.hash),
    write: (state) => {
      const hash = format(state, '', location.hash);
      if (hash !== location.hash) history.replaceState(null, '', hash);
    },
    dark: () => system.matches,
  };
  const root = el('div');
  document.body.append(root);
  await Promise.all([stylesheet('vendor/uPlot.min.css'), stylesheet('style.css')]);
  const app = new App(root, source, view);
  await app.reload();
  system.addEventListener('change', () => app.draw());
  document.body.dataset.ready = 'true';
  let stamps = await newest();
  setInterval(async () => {
    const now = document.hidden ? stamps : await newest();
    if (now === stamps) return;
    stamps = now;
    await app.reload();
  }, APART);
}

/** What changes when anything was written; the same as before where the server does not answer. */
let last = '';
async function newest() {
  try {
    last = JSON.stringify((await source.runs()).runs.map((run) => [run.id, run.last_time]));
  } catch {
    // it may come back
  }
  return last;
}

start();
