// Small helpers for the page. Text goes in as text: no name from a log is ever parsed as HTML.

export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === 'data') Object.assign(node.dataset, value);
    else if (name === 'style') Object.assign(node.style, value);
    else if (name.startsWith('aria-') || name === 'role' || name === 'for') node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function clear(node, ...children) {
  node.replaceChildren(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Children of a node, left in place where they are there already: taken out and put back they would lose their scroll. */
export function keep(node, ...children) {
  const same = node.childNodes.length === children.length && children.every((child, i) => node.childNodes[i] === child);
  if (!same) node.replaceChildren(...children);
}

export function cssColor(name) {
  return getComputedStyle(document.body).getPropertyValue(name).trim() || '#888';
}

/** Three digits, as a person writes them: 0.0123, 1.2e-7, NaN, ∞; "" for what is no number. */
export function number(value) {
  if (value === null || value === undefined || value === '') return '';
  const x = typeof value === 'string' ? Number(value.replace('inf', 'Infinity')) : value;
  if (Number.isNaN(x)) return 'NaN';
  if (!Number.isFinite(x)) return x > 0 ? '∞' : '−∞';
  if (x === 0) return '0';
  const size = Math.abs(x);
  if (size >= 1e5 || size < 1e-3) return x.toExponential(2).replace('e+', 'e').replace(/\.?0+e/, 'e');
  return String(Number(x.toPrecision(3)));
}

/** A path that may break after its dots, and nowhere else. */
export function breakable(path) {
  return path.split(/(?<=\.)/).flatMap((part, i) => (i ? [document.createElement('wbr'), part] : [part]));
}

/** Text with `code` in backquotes set as such. */
export function marked(text) {
  return text.split('`').map((part, i) => (i % 2 ? el('code', {}, part) : part));
}

/** A power of ten on an axis: 1e-3 as "1e-3", 10 as "10". */
export function power(exponent) {
  if (exponent >= -2 && exponent <= 3) return String(Number((10 ** exponent).toPrecision(1)));
  return `1e${exponent}`;
}

/**
 * An empty canvas of CSS size w x h, sharp on dense screens; returns its context in CSS pixels. Setting the size empties it: on
 * paper a `clearRect` paints white over what lies below.
 */
export function sizeCanvas(canvas, w, h) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(w * ratio));
  canvas.height = Math.max(1, Math.round(h * ratio));
  canvas.style.width = `${w}px`;
  canvas.style.height = `${h}px`;
  const context = canvas.getContext('2d');
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

/** Round steps for about `count` ticks between a and b. */
export function ticks(a, b, count) {
  const span = b - a;
  if (!(span > 0)) return [a];
  const raw = span / Math.max(1, count);
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = Math.max(1, unit * [1, 2, 5, 10].find((m) => m * unit >= raw));
  const found = [];
  for (let t = Math.ceil(a / step) * step; t <= b; t += step) found.push(t);
  return found;
}

/** Shorten at the front: the end of a path tells more than its beginning. */
export function elide(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let from = 1;
  while (from < text.length && context.measureText('…' + text.slice(from)).width > width) from += 1;
  return '…' + text.slice(from);
}
