// Histograms of one parameter's gradient over time: log10 of the magnitude across, the newest in front. Of several runs
// the first is filled, and the others lie over it as lines.

import {el, cssColor, number, sizeCanvas, power} from './dom.js';
import {css, rgbAt} from './colors.js';

const MOST = 34;
const HALF_SMALLEST = -7.22; // log10 of float16's smallest number, 5.96e-8: below it a gradient becomes zero.

export class Ridge {
  constructor(place) {
    this.canvas = el('canvas', {role: 'img', 'aria-label': 'Histograms of log10 magnitude over time'});
    place.append(this.canvas);
  }

  /** Draw `runs`, [{data, color}]: decoded histograms, whose first two rows are zeros and non-finite, the others counts. */
  draw({runs, width, height, step}) {
    const [{data}] = runs, others = runs.slice(1).filter((run) => run.data.count && run.data.rows > 2);
    this.outline = others.length ? runs[0].color : cssColor('--gw-page');
    const g = sizeCanvas(this.canvas, width, height);
    g.font = '11px system-ui, sans-serif';
    const bins = data.rows - 2;
    if (!data.count || bins <= 0) {
      g.fillStyle = cssColor('--gw-muted');
      g.fillText(data.count ? 'Every entry was zero or not finite.' : 'No histograms of this path.', 12, 24);
      return;
    }
    const box = {left: 58, right: width - 70, top: 34, bottom: height - 26};
    const all = [data, ...others.map((run) => run.data)];
    const low = Math.min(...all.map((d) => d.left - d.width)), high = Math.max(...all.map((d) => d.left + d.width * (d.rows - 1)));
    const x = (log) => box.left + ((log - low) / (high - low)) * (box.right - box.left);
    this.#axis(g, box, low, high, x, data);
    const stride = Math.ceil(data.count / MOST), shown = [];
    for (let i = data.count - 1; i >= 0; i -= stride) shown.unshift(i);
    const gap = (box.bottom - box.top) / (shown.length + 1.5), peak = Math.max(gap * 2.5, 16);
    let nearest = shown[0], labelled = -1e9;
    for (const i of shown) if (step !== '' && Math.abs(data.steps[i] - step) < Math.abs(data.steps[nearest] - step)) nearest = i;
    shown.forEach((i, k) => {
      const base = box.top + gap * (k + 1.5), chosen = step !== '' && i === nearest;
      const label = chosen || (base - labelled >= 26 && Math.abs(shown.indexOf(nearest) - k) * gap >= (step === '' ? 0 : 13));
      if (label) labelled = base;
      this.#one(g, data, i, {base, peak, x, t: k / Math.max(1, shown.length - 1), chosen, label, box});
      for (const run of others) {
        outline(g, run.data, closest(run.data.steps, data.steps[i]), {base, peak, x});
        g.strokeStyle = run.color;
        g.lineWidth = 1.2;
        g.stroke();
      }
    });
  }

  #one(g, data, i, {base, peak, x, t, chosen, label, box}) {
    const at = (r) => data.values[r * data.count + i];
    const total = outline(g, data, i, {base, peak, x});
    g.closePath();
    const rgb = rgbAt(0.12 + 0.75 * t);
    g.fillStyle = `rgba(${rgb[0]},${rgb[1]},${rgb[2]},.72)`;
    g.fill();
    g.strokeStyle = chosen ? cssColor('--gw-text') : this.outline;
    g.lineWidth = chosen ? 2 : 0.8;
    g.stroke();
    g.fillStyle = cssColor('--gw-muted');
    if (label) {
      g.textAlign = 'right';
      g.fillText(String(data.steps[i]), box.left - 6, base + 3);
    }
    const zeros = total ? at(0) / total : 0;
    g.textAlign = 'left';
    if (zeros > 0) {
      g.fillStyle = css([150, 150, 150]);
      g.fillRect(box.right + 8, base - 3, Math.max(1, 54 * zeros), 3);
    }
    if (at(1) > 0) {
      g.fillStyle = cssColor('--gw-critical');
      g.fillRect(box.right + 8, base - 6, Math.max(2, (54 * at(1)) / total), 3);
    }
  }

  #axis(g, box, low, high, x, data) {
    g.fillStyle = cssColor('--gw-muted');
    g.textAlign = 'center';
    const every = Math.max(1, Math.ceil((high - low) / Math.max(2, (box.right - box.left) / 52)));
    for (let e = Math.ceil(low / every) * every; e <= high; e += every) {
      g.fillStyle = cssColor('--gw-grid');
      g.fillRect(x(e), box.top - 8, 1, box.bottom - box.top + 8);
      g.fillStyle = cssColor('--gw-muted');
      if (x(e) - box.left > 12) g.fillText(power(e), x(e), box.bottom + 14);
    }
    if (low < HALF_SMALLEST && HALF_SMALLEST < high) {
      g.strokeStyle = cssColor('--gw-warning');
      g.setLineDash([4, 3]);
      g.beginPath();
      g.moveTo(x(HALF_SMALLEST), box.top - 8);
      g.lineTo(x(HALF_SMALLEST), box.bottom);
      g.stroke();
      g.setLineDash([]);
      g.fillStyle = cssColor('--gw-warning');
      g.textAlign = x(HALF_SMALLEST) < box.left + 50 ? 'left' : 'center';
      g.fillText('zero in float16', x(HALF_SMALLEST) + (g.textAlign === 'left' ? 4 : 0), box.top - 12);
    }
    g.fillStyle = cssColor('--gw-muted');
    g.textAlign = 'left';
    if (data.values.subarray(0, 2 * data.count).some((v) => v > 0)) g.fillText('zeros', box.right + 8, box.top - 12);
    g.textAlign = 'right';
    g.fillText('step', box.left - 6, box.bottom + 14);
  }
}

/** Trace one histogram, its highest bin `peak` above `base`; return how many entries it counts. */
function outline(g, data, i, {base, peak, x}) {
  const at = (r) => data.values[r * data.count + i], bins = data.rows - 2;
  let total = at(0) + at(1), most = 0;
  for (let b = 0; b < bins; b++) {
    total += at(2 + b);
    most = Math.max(most, at(2 + b));
  }
  g.beginPath();
  g.moveTo(x(data.left - data.width), base);
  for (let b = 0; b < bins; b++) g.lineTo(x(data.left + (b + 0.5) * data.width), base - (most ? (at(2 + b) / most) * peak : 0));
  g.lineTo(x(data.left + (bins + 1) * data.width), base);
  return total;
}

/** The place of the step nearest to another. */
function closest(steps, step) {
  let best = 0;
  for (let i = 1; i < steps.length; i++) if (Math.abs(steps[i] - step) < Math.abs(steps[best] - step)) best = i;
  return best;
}

/** The share of zeros in the newest histogram, in words; "" where there is none. */
export function zeroShare(data) {
  if (!data.count) return '';
  let total = 0;
  for (let r = 0; r < data.rows; r++) total += data.values[r * data.count + data.count - 1];
  const zeros = data.values[data.count - 1];
  return total && zeros ? `${number((100 * zeros) / total)} % zeros at step ${data.steps[data.count - 1]}` : '';
}
