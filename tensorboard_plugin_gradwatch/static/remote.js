// The data over the routes of the server that sent this page.

import {el} from './dom.js';
import {decode} from './matrix.js';

async function get(route, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== '' && value !== undefined);
  const response = await fetch(`./${route}?${new URLSearchParams(given)}`);
  if (!response.ok) {
    const said = await response.json().catch(() => ({}));
    throw new Error(said.message || `The server answered ${response.status}.`);
  }
  return response;
}

const json = async (route, query) => (await get(route, query)).json();
const matrix = async (route, query) => decode(await (await get(route, query)).arrayBuffer());

export const source = {
  runs: () => json('runs'),
  run: (run) => json('run', {run}),
  incidents: (run) => json('incidents', {run}),
  headline: (run, query) => matrix('headline', {run, columns: 4000, ...query}),
  scalars: (run) => matrix('scalars', {run, columns: 4000}),
  matrix: (run, statistic, query) => matrix('matrix', {run, statistic, ...query}),
  histograms: (run, path) => matrix('histograms', {run, path}),
};

/** Load a style sheet; resolves when its rules hold. */
export function stylesheet(name) {
  return new Promise((done) => document.head.append(el('link', {rel: 'stylesheet', href: `./static/${name}`, onload: done, onerror: done})));
}
