// The program as a tree: by module, by source line, or in the order in which it runs.

const NO_MODULE = "(no module)";
const NO_SOURCE = "(boundary of the program)";

function programView(report, showOnMesh) {
  const timed = Boolean(report.machine);
  const cost = timed ? (row) => row.own : (row) => row.flops;
  const total = report.rows.reduce((n, row) => n + cost(row), 0) || 1;
  const columns = [
    { name: "sharding and type", width: "minmax(0, 1.25fr)", className: "type", long: true, title: "of the first result" },
    ...(timed ? [{ name: "time", width: "92px", narrow: "66px", className: "right", bar: true, title: "computation and exposed communication, all runs" },
      { name: "exposed", width: "76px", narrow: "62px", className: "right", title: "communication that is waited for" }] : []),
    { name: "FLOPs", width: "92px", narrow: "66px", className: "right", bar: !timed, title: "operations on one device, all runs" },
    { name: "sent", width: "76px", narrow: "62px", className: "right", title: "bytes sent by one device, all runs" },
    { name: "runs", width: "56px", className: "right", title: "how often it runs" },
  ];
  const details = el("aside", { class: "details panel", "aria-live": "polite" });
  const tree = new Tree(columns, "program", (node) => details.replaceChildren(...describe(node)));
  const state = { by: "module", words: [], sent: false };
  const status = el("span", { class: "muted", role: "status" });

  const cells = (sum, type, runs) => [type, ...(timed ? [blank(sum.time, secondsText), blank(sum.exposed, secondsText)] : []),
    blank(sum.flops, flopsText).replace("FLOP", ""), blank(sum.bytes, bytesText), runs];

  function leaf(row) {
    const node = {
      label: row.op, kind: row.bytes ? "wire" : null, data: row, share: cost(row) / total, children: null,
      note: state.by === "module" ? shortSource(row.source) : row.module, title: `${row.op} ${row.source}`,
      cells: cells({ time: row.own, exposed: row.exposed, flops: row.flops, bytes: row.bytes }, typeText(row), row.trips === 1 ? "" : `x${count(row.trips)}`),
    };
    return node;
  }

  function group(label, rows, children, title = label) {
    const sum = { time: 0, exposed: 0, flops: 0, bytes: 0, cost: 0 };
    for (const row of rows) {
      sum.time += row.own;
      sum.exposed += row.exposed;
      sum.flops += row.flops;
      sum.bytes += row.bytes;
      sum.cost += cost(row);
    }
    return { label, title, kind: "group", children, share: sum.cost / total, data: { label, rows, ...sum }, cells: cells(sum, plural(rows.length, "operation"), "") };
  }

  const makers = {
    module: (rows) => byPath(rows, (row) => (row.module || NO_MODULE).split("/")),
    source: (rows) => byPath(rows, (row) => sourcePath(row.source)),
    order: (rows) => inOrder(rows),
  };

  // Nested groups by path; a group's own rows come after the groups in it.
  function byPath(rows, path) {
    const root = { inner: new Map(), own: [], all: [] };
    for (const row of rows) {
      let node = root;
      for (const part of path(row)) {
        if (!node.inner.has(part)) node.inner.set(part, { inner: new Map(), own: [], all: [] });
        node = node.inner.get(part);
        node.all.push(row);
      }
      node.own.push(row);
    }
    const nodes = (at) => [...named(at.inner).map(([name, inner]) => group(name, inner.all, () => nodes(inner))), ...at.own.map(leaf)];
    return nodes(root);
  }

  // In program order; what has no name comes last.
  function named(inner) {
    const unnamed = ([name]) => name === NO_MODULE || name === NO_SOURCE;
    return [...inner].sort((a, b) => unnamed(a) - unnamed(b));
  }

  function inOrder(rows) {
    const inner = new Map();
    const present = new Set(rows.map((row) => row.index));
    for (const row of rows) {
      const parent = present.has(row.parent) ? row.parent : -1;
      if (!inner.has(parent)) inner.set(parent, []);
      inner.get(parent).push(row);
    }
    const nodes = (parent) => inner.get(parent).map((row) => {
      const node = leaf(row);
      if (inner.has(row.index)) {
        node.children = () => nodes(row.index);
        node.kind = "group";
        node.share = (timed ? row.seconds : row.flops) / total;
        if (timed) node.cells[1] = blank(row.seconds, secondsText);
      }
      return node;
    });
    return inner.has(-1) ? nodes(-1) : [];
  }

  function describe(node) {
    if (!node.data.op) {
      const { label, rows, time, exposed, flops, bytes } = node.data;
      return [el("h3", {}, label), facts([["operations", count(rows.length)], ["share", percentText(node.share)], timed && ["time", secondsText(time)],
        timed && ["exposed", secondsText(exposed)], ["FLOPs", flopsText(flops)], ["sent", bytesText(bytes)]])];
    }
    const row = node.data;
    return [el("h3", {}, row.op), facts([["source", row.source || NO_SOURCE], ["module", row.module || NO_MODULE], ["runs", count(row.trips)],
      timed && ["time", secondsText(row.seconds)], timed && ["exposed", secondsText(row.exposed)], ["FLOPs", flopsText(row.flops)],
      ["sent", bytesText(row.bytes)], ["memory", bytesText(report.memory.over[row.index] || 0)]]),
    values("results", row.results, showOnMesh), values("operands", row.operands, showOnMesh)];
  }

  function refresh() {
    const filtered = state.words.length > 0 || state.sent;
    const rows = filtered ? report.rows.filter((row) => (!state.sent || row.bytes > 0) && state.words.every((w) => searchText(row).includes(w))) : report.rows;
    status.textContent = filtered ? `${plural(rows.length, "operation")} of ${count(report.rows.length)}` : plural(rows.length, "operation");
    const few = rows.length <= 400;
    const single = rows.length > 0 && state.by !== "order";
    tree.setRoots(makers[state.by](rows), (node, depth) => (filtered ? few || depth < 2 : single && depth < 1 && node.share > 0.3));
  }

  const search = el("input", {
    type: "search", id: "search", placeholder: "Search operations, modules, lines, shardings  ( / )", "aria-label": "search the program",
    oninput: () => { state.words = search.value.toLowerCase().split(/\s+/).filter(Boolean); refresh(); },
    onkeydown: (event) => {
      if (event.key === "ArrowDown" || event.key === "Enter") { event.preventDefault(); tree.view.focus(); tree.go(0); }
    },
  });
  const only = el("input", { type: "checkbox", onchange: () => { state.sent = only.checked; refresh(); } });
  const root = el("div", { class: "program" },
    el("div", { class: "tools" },
      choice("group by", [["module", "Modules"], ["source", "Source lines"], ["order", "Program order"]], "module", (by) => { state.by = by; refresh(); }),
      search, el("label", {}, only, "collectives only"), status),
    el("div", { class: "split" }, tree.root, details));
  details.append(el("p", { class: "muted" }, "Choose a line: arrow keys move, right and left open and close, / searches."));
  refresh();
  root.searchCollectives = (text) => {
    only.checked = state.sent = true;
    search.value = text;
    search.dispatchEvent(new Event("input"));
  };
  return root;
}

function facts(pairs) {
  return el("dl", { class: "facts" }, pairs.filter(Boolean).map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

function values(title, texts, showOnMesh) {
  return el("div", {}, el("h4", {}, title), texts.length ? el("ul", { class: "values" }, texts.map((text) => {
    const found = readTyped(text);
    if (!found) return el("li", {}, el("code", {}, text));
    return el("li", {}, el("code", {}, found.name), " ", el("span", { class: "muted" }, found.type), " ",
      el("button", { type: "button", class: "link", title: "show on the mesh", onclick: () => showOnMesh(found) }, found.sharding));
  })) : el("p", { class: "muted" }, "none"));
}

function typeText(row) {
  if (!row.results.length) return "";
  const found = readTyped(row.results[0]);
  return found ? `${found.sharding} ${found.type}` : row.results[0];
}

function searchText(row) {
  row.text = row.text || [row.op, row.module, row.source, ...row.results].join("\n").toLowerCase();
  return row.text;
}

const SOURCE = /^(.*):(\d+)(?: \((.*)\))?$/s;

// `models/layer.py:12 (call)` -> file, then line.
function sourcePath(source) {
  const match = SOURCE.exec(source);
  if (!match) return [source || NO_SOURCE];
  return [match[1], `${match[2]}${match[3] ? ` ${match[3]}` : ""}`];
}

function shortSource(source) {
  const match = SOURCE.exec(source);
  return match ? `${match[1].slice(match[1].lastIndexOf("/") + 1)}:${match[2]}` : source;
}
