// Collectives.

function sums(records, key) {
  const found = new Map();
  for (const c of records) {
    const name = key(c);
    if (!found.has(name)) found.set(name, { name, count: 0, bytes: 0, network: 0, seconds: 0, exposed: 0 });
    const sum = found.get(name);
    for (const field of ["count", "bytes", "network", "seconds", "exposed"]) sum[field] += c[field];
  }
  return [...found.values()].sort((a, b) => b.seconds - a.seconds || b.bytes - a.bytes);
}

const axesText = (c) => c.axes.join(" + ");
const hidden = (c) => Math.max(c.seconds - c.exposed, 0);

function axisBars(report, timed) {
  const found = sums(report.communication, axesText);
  if (!found.length) return el("p", { class: "muted" }, "This program sends nothing.");
  if (!timed) return bars(found.map((c) => ({ name: c.name, strong: c.bytes, faint: 0 })), bytesText, { strong: "", name: "axis" });
  return bars(found.map((c) => ({ name: c.name, strong: c.exposed, faint: hidden(c) })), secondsText, { strong: "exposed", faint: "hidden", name: "axis" });
}

function communicationView(report, search) {
  const timed = Boolean(report.machine);
  const numbers = [
    { name: "count", text: (c) => count(c.count), key: (c) => c.count, right: true },
    { name: "sent", text: (c) => bytesText(c.bytes), key: (c) => c.bytes, right: true },
    ...(Object.keys(report.across).length ? [
      { name: "over dcn", text: (c) => bytesText(c.network), key: (c) => c.network, right: true },
    ] : []),
    ...(timed ? [
      { name: "on the wire", text: (c) => secondsText(c.seconds), key: (c) => c.seconds, right: true },
      { name: "exposed", text: (c) => secondsText(c.exposed), key: (c) => c.exposed, right: true },
    ] : []),
  ];
  const byAxis = sums(report.communication, axesText);
  const charts = el("div", { class: "columns" },
    section("Bytes by axis", "sent by one device", byAxis.length ? bars(byAxis.map((c) => ({ name: c.name, strong: c.bytes, faint: 0 })), bytesText, { strong: "", name: "axis" }) : el("p", { class: "muted" }, "none")),
    timed ? section("Time by axis", "what computation hides, and what it does not", axisBars(report, true)) : null);
  return el("div", {}, charts,
    section("By kind and axes", null, table([
      { name: "collective", text: (c) => c.name }, ...numbers,
    ], sums(report.communication, (c) => `${c.kind}(${axesText(c)})`))),
    section("By source line", "choose a row to find it in the program", table([
      { name: "source", text: (c) => c.source || NO_SOURCE, node: (c) => el("code", {}, c.source || NO_SOURCE), className: "wrap" },
      { name: "collective", text: (c) => `${c.kind}(${axesText(c)})` },
      { name: "for", text: (c) => c.op }, { name: "module", text: (c) => c.module, className: "wrap" }, ...numbers,
    ], report.communication, { choose: (c) => search(c.source) })));
}
