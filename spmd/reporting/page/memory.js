// Memory over the program.

const WIDE = 1000, HIGH = 260; // of the drawing, which scales

function memoryView(report) {
  const { memory, rows } = report;
  const { over, capacity, peak } = memory;
  const top = (capacity && capacity < 2.5 * peak ? Math.max(capacity, peak) : peak) * 1.06 || 1;
  const x = (row) => (over.length < 2 ? 0 : (row / (over.length - 1)) * WIDE);
  const y = (bytes) => HIGH - (bytes / top) * HIGH;
  const state = { row: memory.at, pinned: memory.at };

  const cursor = svg("line", { y1: 0, y2: HIGH, class: "cursor" });
  const pin = svg("line", { y1: 0, y2: HIGH, class: "pin" });
  const dot = svg("circle", { r: 4, class: "dot" });
  const picture = svg("svg", { viewBox: `0 0 ${WIDE} ${HIGH + 14}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    ruler(top).map((bytes) => svg("line", { x1: 0, x2: WIDE, y1: y(bytes), y2: y(bytes), class: "grid" })),
    svg("path", { d: area(over, x, y), class: "area" }),
    loops(rows, x).map(([a, b]) => svg("rect", { x: a, width: Math.max(b - a, 1), y: HIGH + 4, height: 8, class: "loop" })),
    capacity && capacity <= top ? svg("line", { x1: 0, x2: WIDE, y1: y(capacity), y2: y(capacity), class: "capacity" }) : null,
    pin, cursor);
  const scale = el("div", { class: "scale", "aria-hidden": "true" }, ruler(top).map((bytes) => el("span", { css: { top: `${(100 * y(bytes)) / (HIGH + 14)}%` } }, bytesText(bytes))));
  const told = el("p", { class: "told", role: "status" });
  const chart = el("div", {
    class: "chart", id: "memory-chart", tabindex: 0, role: "slider", "aria-label": "instruction", "aria-valuemin": 0, "aria-valuemax": Math.max(over.length - 1, 0),
  }, picture, scale);
  const title = el("span", {});
  const buffers = table([
    { name: "bytes", text: (b) => bytesText(b.bytes), key: (b) => b.bytes, right: true },
    { name: "kind", text: (b) => b.kind },
    { name: "value", text: (b) => b.name, node: (b) => el("code", {}, b.name), className: "wrap" },
    { name: "type", text: (b) => `${b.dtype}[${b.shape.join(",")}]` },
    { name: "sharding", text: (b) => b.sharding, node: (b) => el("code", {}, b.sharding) },
    { name: "held", text: (b) => `${b.start}-${b.end}`, key: (b) => b.end - b.start, right: true },
  ], [], { empty: "no large buffer" });

  function point(row) {
    state.row = Math.min(Math.max(row, 0), over.length - 1);
    for (const name of ["x1", "x2"]) cursor.setAttribute(name, x(state.row));
    const found = rows[state.row];
    told.replaceChildren(el("b", {}, bytesText(over[state.row] || 0)), ` at instruction ${count(state.row)}: `, el("code", {}, found ? found.op : ""),
      " ", el("span", { class: "muted" }, found ? [found.module, found.source].filter(Boolean).join("  ") : ""));
    chart.setAttribute("aria-valuenow", state.row);
    chart.setAttribute("aria-valuetext", told.textContent);
  }

  function choose(row) {
    point(row);
    state.pinned = state.row;
    for (const name of ["x1", "x2"]) pin.setAttribute(name, x(state.row));
    const live = memory.buffers.filter((b) => b.start <= state.row && state.row < b.end);
    const listed = live.reduce((n, b) => n + b.bytes, 0);
    title.textContent = `Held at instruction ${count(state.row)}${state.row === memory.at ? ", the peak" : ""}: ${bytesText(over[state.row] || 0)}, of that listed ${bytesText(listed)}`;
    buffers.setRows(live);
  }

  const rowAt = (event) => {
    const box = picture.getBoundingClientRect();
    return Math.round(((event.clientX - box.left) / box.width) * (over.length - 1));
  };
  chart.addEventListener("pointermove", (event) => point(rowAt(event)));
  chart.addEventListener("pointerleave", () => point(state.pinned));
  chart.addEventListener("click", (event) => choose(rowAt(event)));
  chart.addEventListener("keydown", (event) => {
    const far = Math.max(Math.round(over.length / 50), 1);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowUp: 1, ArrowDown: -1, PageUp: far, PageDown: -far, Home: -Infinity, End: Infinity }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(state.row + step);
  });
  choose(memory.at);
  const room = capacity ? (peak > capacity ? `does not fit: capacity ${bytesText(capacity)}` : `capacity ${bytesText(capacity)}, ${percentText(peak / capacity)} of it at the peak`) : "no machine given: capacity unknown";
  return el("div", {},
    section("Memory over the program", room, chart, told, el("p", { class: "key" },
      capacity && capacity <= top ? [el("i", { class: "dash" }), "capacity"] : null, el("i", { class: "swatch loop" }), "loops and calls",
      el("button", { type: "button", class: "more", onclick: () => choose(memory.at) }, "Go to the peak"))),
    el("section", { class: "panel" }, el("h2", {}, title), buffers),
    section("By kind, at the peak", null, stacked(Object.entries(memory.by_kind), bytesText, "memory")));
}

// A step curve through the most of every pixel column.
function area(over, x, y) {
  const columns = Math.min(over.length, WIDE);
  let path = `M0,${y(0)}`;
  for (let c = 0; c < columns; c++) {
    const from = Math.floor((c * over.length) / columns), to = Math.max(Math.floor(((c + 1) * over.length) / columns), from + 1);
    let most = 0;
    for (let row = from; row < to; row++) most = Math.max(most, over[row]);
    path += `L${x(from).toFixed(1)},${y(most).toFixed(1)}L${x(Math.min(to, over.length - 1)).toFixed(1)},${y(most).toFixed(1)}`;
  }
  return `${path}L${WIDE},${y(0)}Z`;
}

// Steps of 1, 2 or 5 in binary units: about four of them.
function ruler(top) {
  const unit = 1024 ** Math.max(Math.floor(Math.log(top) / Math.log(1024)), 0);
  let step = unit;
  for (const factor of [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]) {
    step = unit * factor;
    if (top / step <= 5) break;
  }
  const found = [];
  for (let n = step; n < top; n += step) found.push(n);
  return found;
}

// Where the loops and calls at the top of the program are.
function loops(rows, x) {
  const found = [];
  rows.forEach((row) => {
    let { index } = row;
    while (rows[index].parent >= 0) index = rows[index].parent;
    if (index === row.index) return;
    const last = found[found.length - 1];
    if (last && last.index === index) last.end = row.index;
    else found.push({ index, end: row.index });
  });
  return found.map(({ index, end }) => [x(index), x(end)]);
}
