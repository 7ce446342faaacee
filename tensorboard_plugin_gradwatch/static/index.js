// The TensorBoard tab: data over our routes, theme and links from the page around our frame.

import {App} from './app.js';
import {el} from './dom.js';
import {source, stylesheet} from './remote.js';
import {format, parse} from './state.js';

const PREFIX = 'p.gradwatch.';

/** The page around us, which is of the same origin; null where a host forbids it. */
function host() {
  try {
    return window.parent.document ? window.parent : null;
  } catch {
    return null;
  }
}

const view = {
  read: () => parse(host()?.location.hash || '', PREFIX),
  write: (state) => {
    const page = host();
    if (!page) return;
    const hash = format(state, PREFIX, page.location.hash);
    // replaceState: no entry in the history for every click, and no event that would make TensorBoard reload us.
    if (hash !== page.location.hash) page.history.replaceState(page.history.state, '', hash);
  },
  dark: () => host()?.document.body.classList.contains('dark-mode') ?? false,
};

/** Tell when TensorBoard has read new data. The protocol's messages all begin with `experimental`. */
function onReload(listener) {
  const channel = new MessageChannel();
  channel.port1.onmessage = (event) => {
    const message = JSON.parse(event.data);
    if (message.isReply) return;
    if (message.type === 'experimental.DataReloaded') listener();
    channel.port1.postMessage(JSON.stringify({type: message.type, id: message.id, payload: null, error: null, isReply: true}));
  };
  window.parent.postMessage('experimental.bootstrap', '*', [channel.port2]);
}

export async function render() {
  const began = performance.now();
  document.title = 'GradWatch';
  document.documentElement.lang = 'en';
  const root = el('div');
  document.body.append(root);
  // The widths come from the style sheet, so the first drawing waits for it.
  await Promise.all([stylesheet('vendor/uPlot.min.css'), stylesheet('style.css')]);
  const app = new App(root, source, view);
  await app.reload();
  document.body.dataset.ready = String(Math.round(performance.now() - began));
  const page = host();
  if (page) {
    new MutationObserver(() => view.dark() !== document.body.classList.contains('gw-dark') && app.draw())
      .observe(page.document.body, {attributes: true, attributeFilter: ['class']});
  }
  onReload(() => app.reload());
}
