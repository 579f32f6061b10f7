// The tiles on top, and the first view.

function tiles(report) {
  const { memory, flops } = report;
  const total = flops.useful + flops.replicated + flops.padded + flops.recomputed;
  const timed = Boolean(report.machine);
  const tile = (name, value, note, share) => el("div", { class: "tile" },
    el("dt", {}, name), el("dd", {}, value),
    el("dd", { class: "note" }, note),
    share === undefined ? null : el("div", { class: `meter${share > 1 ? " over" : ""}`, role: "img", "aria-label": percentText(share) },
      el("i", { css: { width: `${Math.min(100 * share, 100)}%` } })));
  const sent = report.communication.reduce((n, c) => n + c.bytes, 0);
  const room = memory.capacity ? memory.peak / memory.capacity : undefined;
  return el("dl", { class: "tiles" },
    timed ? tile("Predicted step", secondsText(report.seconds), `on ${report.machine}`) : tile("Predicted step", "-", "no machine given"),
    timed ? tile("Utilisation", percentText(report.utilisation), "useful FLOPs of the peak", report.utilisation) : null,
    timed ? tile("Exposed", secondsText(report.exposed), "communication, not hidden", report.seconds ? report.exposed / report.seconds : 0) : null,
    tile("Peak memory", bytesText(memory.peak), room === undefined ? "per device" : room > 1 ? `does not fit: ${bytesText(memory.capacity)}` : `${percentText(room)} of ${bytesText(memory.capacity)}`, room),
    tile("Sent", bytesText(sent), `${plural(report.communication.reduce((n, c) => n + c.count, 0), "collective")}`),
    tile("Operations", flopsText(total), `${percentText(total ? flops.useful / total : 1)} useful`, total ? flops.useful / total : 1));
}

function overview(report, open) {
  const { flops, memory } = report;
  const left = [
    section("Operations", "per device", stacked(Object.entries(flops), flopsText, "operations")),
    section("Memory at the peak", "per device", stacked(Object.entries(memory.by_kind), bytesText, "memory")),
  ];
  const right = [
    section("Communication by axis", null, axisBars(report, Boolean(report.machine)),
      el("button", { type: "button", class: "more", onclick: () => open("communication") }, "All collectives")),
    section("Dearest modules", report.machine ? "by time" : "by operations", dearest(report)),
  ];
  return el("div", { class: "columns" }, el("div", {}, left), el("div", {}, right),
    el("div", { class: "wide" }, section("Findings", "what the annotations do not say, or leave undone", findings(report.findings.slice(0, 5)),
      report.findings.length > 5 ? el("button", { type: "button", class: "more", onclick: () => open("findings") }, `All ${report.findings.length} findings`) : null)));
}

function findings(found) {
  if (!found.length) return el("p", { class: "muted" }, "none");
  return el("ol", { class: "findings" }, found.map((f) => el("li", {},
    el("p", {}, el("b", {}, f.kind), " ", el("code", {}, f.value), f.bytes ? el("span", { class: "cost" }, bytesText(f.bytes)) : null),
    el("p", {}, f.text),
    f.source ? el("p", { class: "muted" }, el("code", {}, f.source)) : null,
    f.remedy ? el("p", { class: "remedy" }, f.remedy) : null)));
}

function dearest(report) {
  const cost = report.machine ? (row) => row.own : (row) => row.flops;
  const sums = new Map();
  for (const row of report.rows) {
    const module = row.module || NO_MODULE;
    sums.set(module, (sums.get(module) || 0) + cost(row));
  }
  const rows = [...sums].sort((a, b) => b[1] - a[1]).slice(0, 8).filter(([, n]) => n > 0);
  if (!rows.length) return el("p", { class: "muted" }, "none");
  return bars(rows.map(([name, n]) => ({ name, strong: n, faint: 0 })), report.machine ? secondsText : flopsText, { strong: "", name: "module" });
}
