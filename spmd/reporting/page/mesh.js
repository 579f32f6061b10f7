// The mesh, and which device holds which part of a tensor.

const FEW = 64; // devices up to which cells carry their number

function meshView(report) {
  const axes = Object.entries(report.mesh);
  const drawn = axes.filter(([, size]) => size > 1);
  const tensors = [...report.arguments.map((t) => ({ ...t, group: t.kind })), ...report.results.map((t) => ({ ...t, group: "result" }))]
    .map((t) => ({ name: t.name, type: `${t.dtype}[${t.shape.join(",")}]`, shape: t.shape, sharding: t.sharding, group: t.group }));
  const picture = el("div", { class: "mesh" });
  const list = el("div", { class: "picks", role: "listbox", "aria-label": "tensors" });
  const filter = el("input", { type: "search", id: "tensor-search", placeholder: "Find a tensor", "aria-label": "find a tensor", oninput: () => drawList() });
  let chosen = null;

  function drawList() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = tensors.filter((t) => words.every((w) => `${t.name} ${t.sharding} ${t.group}`.toLowerCase().includes(w)));
    list.replaceChildren(...found.slice(0, FIRST).map((t) => el("button", {
      type: "button", role: "option", "aria-selected": String(t === chosen), onclick: () => choose(t),
    }, el("span", {}, t.name), el("small", {}, `${t.type} ${t.sharding}`))),
    found.length > FIRST ? el("p", { class: "muted" }, `${count(found.length - FIRST)} more: narrow the search`) : "");
    if (!found.length) list.append(el("p", { class: "muted" }, "nothing found"));
  }

  function choose(tensor) {
    chosen = tensor;
    for (const b of list.children) if (b.role === "option") b.setAttribute("aria-selected", String(b.firstChild.textContent === tensor.name));
    picture.replaceChildren(...drawPlacement(tensor, axes, drawn));
  }

  list.addEventListener("keydown", (event) => {
    const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    if (!step || !document.activeElement[step]) return;
    event.preventDefault();
    document.activeElement[step].focus();
  });
  const root = el("div", { class: "placement" }, el("section", { class: "panel picker" }, el("h2", {}, "Tensor"), filter, list), el("section", { class: "panel" }, picture));
  root.show = (tensor) => {
    let known = tensors.find((t) => t.name === tensor.name && t.sharding === tensor.sharding);
    if (!known) {
      known = { ...tensor, group: "value" };
      tensors.unshift(known);
    }
    filter.value = "";
    drawList();
    choose(known);
  };
  drawList();
  const first = tensors.reduce((a, b) => (a && a.shape.reduce((n, d) => n * d, 1) >= b.shape.reduce((n, d) => n * d, 1) ? a : b), null);
  if (first) choose(first);
  else picture.append(el("p", { class: "muted" }, "The program has no arguments."));
  return root;
}

// Hue says which part along the first sharded dim, lightness which along the others.
function colors(parts) {
  const dims = parts[0].index.map((_, d) => d).filter((d) => parts.some((p) => p.index[d] !== parts[0].index[d]));
  const first = dims[0];
  const major = (p) => (first === undefined ? p.addend : p.index[first]);
  const hues = 1 + Math.max(...parts.map(major));
  const groups = new Map();
  for (const p of parts) groups.set(major(p), [...(groups.get(major(p)) || []), p]);
  return new Map(parts.map((p) => {
    const group = groups.get(major(p));
    const depth = group.length < 2 ? 0.5 : group.indexOf(p) / (group.length - 1);
    const hue = (255 + (hues < 2 ? 0 : (major(p) * 300) / hues)) % 360;
    p.deep = depth > 0.55;
    return [p, `oklch(${(0.84 - 0.32 * depth).toFixed(3)} ${(0.07 + 0.05 * depth).toFixed(3)} ${hue.toFixed(1)})`];
  }));
}

function drawPlacement(tensor, axes, drawn) {
  const placed = place(tensor.shape, tensor.sharding, axes);
  const { parts, partOf, counts, layout, partial } = placed;
  const color = colors(parts);
  const copies = Math.max(...parts.map((p) => p.devices.length));
  const local = tensor.shape.map((n, d) => Math.ceil(n / (counts[d] || 1)));
  const told = el("p", { class: "says", role: "status" }, "Point at a device, or move with the arrow keys: every device that holds the same part is marked.");
  const cells = [];
  let at = 0;

  function tell(device) {
    const part = partOf[device];
    cells.forEach((cell, d) => cell.classList.toggle("same", partOf[d] === part));
    cells[at].setAttribute("tabindex", -1);
    cells[at].classList.remove("told");
    at = device;
    cells[at].setAttribute("tabindex", 0);
    cells[at].classList.add("told");
    const where = [...coordinates(device, axes)].filter(([name]) => drawn.some(([n]) => n === name)).map(([name, i]) => `${name}=${i}`).join(", ");
    told.replaceChildren(el("b", {}, `device ${device}`), where ? ` (${where})` : "", " holds ", el("code", {}, rangesText(part.ranges)),
      partial.length ? `, one addend of ${partial.length > 1 ? "several" : plural(partial.reduce((n, a) => n * new Map(axes).get(a), 1), "addend")}` : "",
      part.devices.length > 1 ? `; the same part on ${plural(part.devices.length, "device")}` : "; nobody else does");
  }

  const grid = meshGrid(drawn, partOf, color, cells, tell);
  grid.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: grid.columns, ArrowUp: -grid.columns, Home: -Infinity, End: Infinity }[event.key];
    if (!step) return;
    event.preventDefault();
    tell(Math.min(Math.max(at + step, 0), cells.length - 1));
    cells[at].focus();
  });
  const dims = layout.dims.map((dim, d) => [`dim ${d}`, dim.length ? `${count(tensor.shape[d])} over ${dim.join(" + ")}: ${counts[d]} parts of ${count(local[d])}${tensor.shape[d] % counts[d] ? ", the last one padded" : ""}` : `${count(tensor.shape[d])}, whole`]);
  return [
    el("h2", {}, el("code", {}, tensor.name), el("span", { class: "note" }, `${tensor.type} ${tensor.sharding}`)),
    facts([["local shape", `[${local.join(", ")}]`], ["replicas", copies > 1 ? `every part is on ${plural(copies, "device")}` : "none: every device holds another part"],
      partial.length && ["partial", `over ${partial.join(" + ")}: what the devices hold is still to be combined`], ...dims,
      !placed.known && ["note", "it uses axes of a manual region, which are not drawn"]]),
    told, grid, el("h3", {}, "Parts of the tensor"), legend(parts, color, told, cells, partOf)];
}

// The last axis goes across, the one before down, all others are separate blocks.
function meshGrid(drawn, partOf, color, cells, tell) {
  const total = partOf.length;
  const across = drawn.length ? drawn[drawn.length - 1] : ["", 1];
  const down = drawn.length > 1 ? drawn[drawn.length - 2] : ["", 1];
  const outer = drawn.slice(0, -2);
  // Scrolling brings cells under a pointer that rests: only one that moves points.
  const moved = (event, device) => {
    if ((event.movementX || event.movementY) && !cells[device].classList.contains("told")) tell(device);
  };
  const wrap = drawn.length < 2 && total > 16 ? Math.min(total, total <= 256 ? 16 : 64) : across[1];
  const size = total <= FEW && wrap <= 16 ? Math.max(30, Math.min(52, Math.floor(640 / wrap))) : Math.max(5, Math.min(total > 512 ? 11 : 22, Math.floor(620 / wrap)));
  const gap = size > 22 ? 3 : 1;
  const perBlock = across[1] * down[1];
  const blocks = [];
  for (let start = 0; start < total; start += perBlock) {
    const lines = Math.ceil(perBlock / wrap);
    const left = down[0] ? 34 : 4;
    const box = svg("svg", { width: left + wrap * (size + gap), height: 18 + lines * (size + gap), role: "group", "aria-label": "devices" },
      svg("text", { x: left, y: 11, class: "axis" }, across[0] ? `${across[0]} →` : ""),
      down[0] ? svg("text", { x: -18, y: 12, class: "axis", transform: "rotate(-90)", "text-anchor": "end" }, `← ${down[0]}`) : null);
    for (let i = 0; i < perBlock; i++) {
      const device = start + i;
      const cell = svg("g", { class: partOf[device].deep ? "cell deep" : "cell", tabindex: device ? -1 : 0, role: "img", "aria-label": `device ${device}: ${rangesText(partOf[device].ranges)}`, "data-part": partOf[device].number, onpointermove: (e) => moved(e, device), onfocus: () => tell(device), onclick: () => tell(device) },
        svg("rect", { x: left + (i % wrap) * (size + gap), y: 18 + Math.floor(i / wrap) * (size + gap), width: size, height: size, rx: size > 22 ? 3 : 0, fill: color.get(partOf[device]) }),
        size > 22 ? svg("text", { x: left + (i % wrap) * (size + gap) + size / 2, y: 18 + Math.floor(i / wrap) * (size + gap) + size / 2 + 4, "text-anchor": "middle" }, String(device)) : null);
      cells.push(cell);
      box.append(cell);
    }
    const at = coordinates(start / perBlock, outer);
    blocks.push(el("figure", {}, outer.length ? el("figcaption", {}, [...at].map(([name, n]) => `${name}=${n}`).join(" ")) : null, box));
  }
  const root = el("div", { class: "blocks" }, blocks);
  root.columns = wrap;
  return root;
}

function legend(parts, color, told, cells, partOf) {
  const shown = parts.slice(0, 64);
  const mark = (part) => cells.forEach((cell, d) => cell.classList.toggle("same", partOf[d] === part));
  return el("div", {}, el("ul", { class: "parts" }, shown.map((part) => el("li", { onpointerenter: () => mark(part) }, swatch(color.get(part)),
    el("code", {}, rangesText(part.ranges)), el("span", { class: "muted" }, part.devices.length > 1 ? `on ${count(part.devices.length)}` : `on ${part.devices[0]}`)))),
  parts.length > shown.length ? el("p", { class: "muted" }, `and ${count(parts.length - shown.length)} more parts`) : null);
}
