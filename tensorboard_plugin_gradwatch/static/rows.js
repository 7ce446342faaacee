// Which rows a picture has: paths in forward order, filtered; a folded block is one row.

/** "h.3.attn.c" -> "h.3": up to and including the first number, else the first name. */
export function blockOf(path) {
  const parts = path.split('.');
  const at = parts.findIndex((part) => /^\d+$/.test(part));
  return at >= 0 ? parts.slice(0, at + 1).join('.') : parts[0];
}

/** The paths a statistic has a value for, with their place in its matrix, in forward order. */
export function pathsOf(index, over) {
  const found = [];
  index.paths.forEach((path, i) => {
    if (over !== 'all' && index.kinds[i] !== over) return;
    const flat = index.kinds[i] === 'parameter' && index.shapes[i].length < 2;
    found.push({path, place: found.length, depth: index.depth[i], flat, numel: index.numel[i],
      parameter: index.kinds[i] === 'parameter', type: (index.types || [])[i] || '', block: blockOf(path)});
  });
  // A block stays together where it begins: what never ran by itself (attn.out_proj) has no place of its own in the order.
  const begins = new Map();
  for (const {block, depth} of found) begins.set(block, Math.min(depth, begins.get(block) ?? Infinity));
  return found.sort((a, b) => begins.get(a.block) - begins.get(b.block) || a.depth - b.depth || a.place - b.place);
}

/** A test for the filter box: every word must occur; `*` stands for anything, dots included. */
export function matcher(filter) {
  const words = filter.trim().toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
    const parts = word.split('*').map((part) => part.replace(/[.+?^${}()|[\]\\]/g, '\\$&'));
    return parts.length > 1 ? new RegExp(`^${parts.join('.*')}$`) : new RegExp(parts[0]);
  });
  return (path) => words.every((word) => word.test(path.toLowerCase()));
}

const HIGHEST = 18, NAMED = 12, LOWEST = 2, FOLDED = 14;
const MOST_NAMED = 64;

/**
 * Lay the rows out.
 * @returns {{rows: object[], blocks: object[], height: number, hidden: number}} rows with `members` (places in the
 *   matrix), `y` and `height`; blocks of two and more with their extent; how many paths the filter or the bias
 *   switch hides.
 */
export function layoutRows(paths, {filter, biases, folded}, room) {
  const wanted = matcher(filter);
  const onlyFlat = paths.every((p) => p.flat);
  const shown = paths.filter((p) => wanted(p.path) && (biases || onlyFlat || !p.flat));
  const groups = [];
  for (const path of shown) {
    const last = groups[groups.length - 1];
    if (last && last.name === path.block) last.paths.push(path);
    else groups.push({name: path.block, paths: [path]});
  }
  const isFolded = (group) => group.paths.length > 1 && folded.has(group.name);
  const open = groups.reduce((n, g) => n + (isFolded(g) ? 0 : g.paths.length), 0);
  const closed = groups.filter(isFolded).length;
  const fitting = Math.min(HIGHEST, Math.floor((room - closed * FOLDED) / Math.max(1, open)));
  const height = Math.max(open <= MOST_NAMED ? NAMED : LOWEST, fitting);
  const rows = [], blocks = [];
  let y = 0;
  for (const group of groups) {
    const top = y, shut = isFolded(group);
    if (shut) {
      const h = Math.max(height, FOLDED);
      rows.push({label: group.name, path: group.name, block: group.name, members: group.paths.map((p) => p.place),
        numel: group.paths.reduce((n, p) => n + p.numel, 0), type: `${group.paths.length} paths`, y, height: h, folded: true});
      y += h;
    } else {
      for (const path of group.paths) {
        rows.push({...path, label: labelOf(path, group.paths.length > 1, biases), members: [path.place], y, height, folded: false});
        y += height;
      }
    }
    if (group.paths.length > 1) blocks.push({name: group.name, y: top, height: y - top, folded: shut, count: group.paths.length});
  }
  return {rows, blocks, height: y, rowHeight: height, hidden: paths.length - shown.length};
}

function labelOf(path, inBlock, biases) {
  let text = path.path;
  if (inBlock && text.startsWith(path.block + '.')) text = text.slice(path.block.length + 1);
  if (!biases && text.endsWith('.weight')) text = text.slice(0, -'.weight'.length);
  return text || '(root)';
}

/** The row that shows a path: its own, its folded block's, its weight's for a hidden bias, a module's for a parameter. */
export function rowOf(layout, path) {
  if (!path) return null;
  const exact = layout.rows.find((row) => row.path === path);
  if (exact) return exact;
  const block = blockOf(path);
  const folded = layout.rows.find((row) => row.folded && row.block === block);
  if (folded) return folded;
  const owner = path.slice(0, Math.max(0, path.lastIndexOf('.')));
  return layout.rows.find((row) => row.path === `${owner}.weight`) || layout.rows.find((row) => row.path.startsWith(path + '.'))
    || layout.rows.find((row) => path.startsWith(row.path + '.') && !row.folded) || null;
}
