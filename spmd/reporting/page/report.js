// Puts the page of a report together. Views are made when they are first opened.

function records(data) {
  return data.rows.map((row) => {
    const record = {};
    data.columns.forEach((name, i) => { record[name] = row[i]; });
    return record;
  });
}

function readReport(data) {
  for (const name of ["communication", "arguments", "results", "rows", "findings"]) data[name] = records(data[name]);
  data.memory.buffers = records(data.memory.buffers);
  // What a row takes itself: a region's time is that of everything in it.
  data.rows.forEach((row, i) => { row.index = i; row.own = row.seconds; });
  for (const row of data.rows) if (row.parent >= 0) data.rows[row.parent].own -= row.seconds;
  for (const row of data.rows) row.own = Math.max(row.own, 0);
  return data;
}

function start(report) {
  const views = new Map([
    ["overview", ["Overview", () => overview(report, open)]],
    ["program", ["Program", () => programView(report, showOnMesh)]],
    ["memory", ["Memory", () => memoryView(report)]],
    ["communication", ["Communication", () => communicationView(report, searchProgram)]],
    ["mesh", ["Mesh", () => meshView(report)]],
    ["tensors", ["Tensors", () => tensorsView(report, showOnMesh)]],
    ["findings", [`Findings (${report.findings.length})`, () => section("Findings", "what the annotations do not say, or leave undone", findings(report.findings))]],
  ]);
  const made = new Map(), tabs = new Map();
  const main = el("main", {});

  function view(key) {
    if (!made.has(key)) {
      made.set(key, el("div", { id: `view-${key}`, role: "tabpanel", "aria-labelledby": `tab-${key}`, hidden: true }, views.get(key)[1]()));
      main.append(made.get(key));
    }
    return made.get(key).firstChild;
  }

  function open(key) {
    view(key);
    for (const [name, panel] of made) panel.hidden = name !== key;
    for (const [name, tab] of tabs) {
      tab.setAttribute("aria-selected", String(name === key));
      tab.tabIndex = name === key ? 0 : -1;
    }
  }

  function showOnMesh(tensor) {
    open("mesh");
    view("mesh").show(tensor);
    main.scrollIntoView();
  }

  function searchProgram(text) {
    open("program");
    view("program").searchCollectives(text);
    document.getElementById("search").focus();
  }

  for (const [key, [title]] of views) tabs.set(key, el("button", { type: "button", role: "tab", id: `tab-${key}`, "aria-controls": `view-${key}`, onclick: () => open(key) }, title));
  const bar = el("div", { class: "tabs", role: "tablist", "aria-label": "views" }, [...tabs.values()]);
  bar.addEventListener("keydown", (event) => {
    const keys = [...tabs.keys()], step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = keys[(keys.findIndex((k) => tabs.get(k) === document.activeElement) + step + keys.length) % keys.length];
    open(next);
    tabs.get(next).focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA)$/.test(document.activeElement.tagName)) return;
    event.preventDefault();
    open("program");
    document.getElementById("search").focus();
  });
  const mesh = Object.entries(report.mesh).map(([name, size]) => `${name}=${size}${placeText(report.across[name] ?? 1, size)}`).join(" ");
  document.body.append(
    el("header", {}, el("h1", {}, report.name), el("p", {}, [mesh || "one device", plural(report.devices, "device"), report.machine,
      ...Object.entries(report.versions).map(([name, version]) => `${name} ${version}`)].filter(Boolean).join("  ·  "))),
    tiles(report), bar, main);
  open("overview");
}

// Whether an axis lies between slices or nodes, or which part of it.
function placeText(nodes, size) {
  return nodes === 1 ? "" : nodes === size ? "@dcn" : `(${nodes}@dcn)`;
}

start(readReport(JSON.parse(document.getElementById("data").textContent)));
