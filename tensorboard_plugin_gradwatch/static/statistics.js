// What the statistics mean: label, kind of scale, how a block's rows combine, and a guide where there is one.

const CATALOGUE = {
  grad_norm: {label: 'gradient norm', combine: 'norm',
    help: 'L2 norm of each parameter’s gradient, as the optimizer gets it before treatment.'},
  update_ratio: {label: 'update / weight ratio', combine: 'max', guide: 1e-3,
    help: 'Size of the update over size of the weight. Around 1e-3 (log10 −3) is usual; 1e-1 is wild, 1e-6 hardly moves.'},
  grad_output_norm: {label: 'grad_output norm', combine: 'norm',
    help: 'Gradient of the loss with respect to each module’s output: where the signal grows or fades on its way back.'},
  output_rms: {label: 'activation rms', combine: 'max', help: 'Root mean square of each module’s output.'},
  zero_fraction: {label: 'zero share of gradient', combine: 'max', linear: true,
    help: 'Share of the gradient’s entries that are exactly zero.'},
  param_norm: {label: 'weight norm', combine: 'norm', help: 'L2 norm of each parameter.'},
  grad_absmax: {label: 'gradient, largest entry', combine: 'max', help: 'Largest magnitude in each gradient.'},
  update_norm: {label: 'update norm', combine: 'norm', help: 'L2 norm of what the optimizer added.'},
  nonfinite_count: {label: 'non-finite entries', combine: 'max', help: 'NaN and infinite entries of each gradient.'},
  underflow_fraction: {label: 'underflow share', combine: 'max', linear: true,
    help: 'Share of the gradient’s entries below float16’s smallest number.'},
  output_zero_fraction: {label: 'activation zero share', combine: 'max', linear: true,
    help: 'Share of each output that is exactly zero.'},
  silent_fraction: {label: 'silent units', combine: 'max', linear: true,
    help: 'Share of units that no sample of the window activated.'},
  saturated_fraction: {label: 'saturated share', combine: 'max', linear: true,
    help: 'Share of sigmoid or tanh inputs beyond ±5, where the slope is nearly zero.'},
  output_std: {label: 'activation standard deviation', combine: 'max', help: 'Spread of each module’s output.'},
  output_mean: {label: 'activation |mean|', combine: 'max', help: 'Magnitude of the mean of each module’s output.'},
  output_absmax: {label: 'activation, largest', combine: 'max', help: 'Largest magnitude in each module’s output.'},
  grad_output_absmax: {label: 'grad_output, largest', combine: 'max', help: 'Largest magnitude in each grad_output.'},
  output_nonfinite: {label: 'non-finite activations', combine: 'max', help: 'NaN and infinite outputs.'},
  input_nonfinite: {label: 'non-finite inputs', combine: 'max', help: 'NaN and infinite inputs.'},
  grad_output_nonfinite: {label: 'non-finite grad_output', combine: 'max', help: 'NaN and infinite entries.'},
  row_spread: {label: 'row spread at start', combine: 'max', help: 'How much a weight’s rows differ; 0 is a symmetric start.'},
};

const ORDER = Object.keys(CATALOGUE);

export function describe(name) {
  const known = CATALOGUE[name] || {};
  return {name, label: name.replaceAll('_', ' '), combine: 'max', linear: false, guide: null, help: '', ...known};
}

/** Known statistics first, in the order of the catalogue, then the others by name. */
export function sortStatistics(names) {
  const place = (name) => (ORDER.indexOf(name) + 1 || ORDER.length + 1);
  return [...names].sort((a, b) => place(a) - place(b) || (a < b ? -1 : 1));
}

/** The value of several rows as one: a norm from the sum of squares, else the largest. NaN stays, zero rows count. */
export function combine(how, values) {
  let measured = false, sum = 0, most = -Infinity;
  for (const v of values) {
    if (v === -Infinity) continue;
    if (Number.isNaN(v)) return NaN;
    measured = true;
    sum += v * v;
    if (v > most) most = v;
  }
  if (!measured) return -Infinity;
  return how === 'norm' && Number.isFinite(most) ? Math.sqrt(sum) : most;
}
