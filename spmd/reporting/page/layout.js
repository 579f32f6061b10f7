// Where the parts of a tensor lie. Reads the canonical text of a layout: `[data+fsdp, -] partial{tensor:add}`.

const TYPED = /^(.*) (\S+) (\[[^\[\]{}]*\](?: partial\{[^{}]*\})?)$/s;

// `name f32[64,256] [data, -]` -> its parts; null for a literal.
function readTyped(text) {
  const match = TYPED.exec(text);
  if (!match) return null;
  const shape = /\[([\d,]*)\]$/.exec(match[2]);
  return {
    name: match[1], type: match[2], sharding: match[3],
    shape: shape && shape[1] ? shape[1].split(",").map(Number) : [],
  };
}

function readLayout(text) {
  const inside = text.slice(1, text.indexOf("]"));
  const dims = inside ? inside.split(", ").map((dim) => (dim === "-" ? [] : dim.split("+"))) : [];
  const partial = /partial\{([^{}]*)\}/.exec(text);
  return {
    dims,
    partial: partial ? partial[1].split(", ").map((p) => p.slice(0, p.lastIndexOf(":"))) : [],
  };
}

// What every device holds of a tensor.
//   axes: [name, size] of the mesh, major to minor.
// parts: of the tensor, each {ranges: per dim [start, end], devices}; partOf: device -> part.
function place(shape, text, axes) {
  const layout = readLayout(text);
  const sizes = new Map(axes);
  const known = layout.dims.every((dim) => dim.every((a) => sizes.has(a)));
  const counts = layout.dims.map((dim) => dim.reduce((n, a) => n * (sizes.get(a) || 1), 1));
  const total = axes.reduce((n, [, size]) => n * size, 1);
  const partial = layout.partial.filter((a) => sizes.has(a));
  const partOf = new Array(total);
  const found = new Map();
  for (let device = 0; device < total; device++) {
    const at = coordinates(device, axes);
    const index = layout.dims.map((dim) => dim.reduce((i, a) => i * (sizes.get(a) || 1) + (at.get(a) || 0), 0));
    const addend = partial.reduce((i, a) => i * sizes.get(a) + at.get(a), 0);
    const key = [...index, addend].join();
    if (!found.has(key)) found.set(key, { index, addend, devices: [], ranges: index.map((i, d) => range(shape[d], counts[d], i)) });
    found.get(key).devices.push(device);
    partOf[device] = found.get(key);
  }
  const parts = [...found.values()];
  parts.sort((a, b) => compare([...a.index, a.addend], [...b.index, b.addend]));
  parts.forEach((part, i) => { part.number = i; });
  return { layout, counts, parts, partOf, partial, known };
}

function range(size, parts, i) {
  const step = Math.ceil(size / parts);
  return [Math.min(i * step, size), Math.min((i + 1) * step, size)];
}

function coordinates(device, axes) {
  const at = new Map(axes.map(([name]) => [name, 0]));
  for (let i = axes.length - 1; i >= 0; i--) {
    at.set(axes[i][0], device % axes[i][1]);
    device = Math.floor(device / axes[i][1]);
  }
  return at;
}

function compare(a, b) {
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return a[i] - b[i];
  return 0;
}

const rangesText = (ranges) => (ranges.length ? `[${ranges.map(([a, b]) => `${a}:${b}`).join(", ")}]` : "the scalar");
