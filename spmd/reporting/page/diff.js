// The page of the difference of two reports.

const GROUPS = [["summary", "Summary"], ["operations", "Operations"], ["memory", "Memory at the peak"], ["communication", "Communication"], ["source line", "Communication by source line"]];

function diffRows(diff, group, onlyDifferent) {
  return diff.changes.map((c, i) => ({ ...c, texts: diff.texts[i] })).filter((c) => c.group === group && (!onlyDifferent || c.after !== c.before));
}

function changeTable(rows) {
  const most = Math.max(...rows.map((c) => Math.abs(c.after - c.before)), 0);
  const one = new Set(rows.map((c) => c.unit)).size === 1;
  return table([
    { name: "", text: (c) => c.name, className: "wrap" },
    { name: "before", text: (c) => c.texts[0], key: (c) => c.before, right: true },
    { name: "after", text: (c) => c.texts[1], key: (c) => c.after, right: true },
    { name: "difference", text: (c) => c.texts[2], key: (c) => c.after - c.before, right: true },
    { name: "", text: (c) => c.texts[3], key: (c) => (c.before ? c.after / c.before : Infinity), right: true, className: "muted" },
    ...(one && most ? [{ name: "less | more", text: () => "", key: (c) => c.after - c.before, node: (c) => both((c.after - c.before) / most) }] : []),
  ], rows, { className: "changes" });
}

function both(share) {
  return el("div", { class: "both" },
    el("div", {}, el("i", { css: { width: `${Math.max(-share, 0) * 100}%`, background: "var(--faint)" } })),
    el("div", {}, el("i", { css: { width: `${Math.max(share, 0) * 100}%`, background: "var(--accent)" } })));
}

function diffFindings(found) {
  return el("ul", { class: "findings" }, found.map((f) => el("li", {}, el("p", {}, el("b", {}, f.kind), " ", el("code", {}, f.value)), el("p", {}, f.text))));
}

function startDiff(diff) {
  document.body.append(el("header", {}, el("h1", {}, "Difference of two reports"),
    el("dl", { class: "facts" }, el("dt", {}, "before"), el("dd", {}, diff.before), el("dt", {}, "after"), el("dd", {}, diff.after))),
  el("main", {}, GROUPS.map(([group, title]) => {
    const rows = diffRows(diff, group, group === "communication" || group === "source line");
    return rows.length ? section(title, "per device and call", changeTable(rows)) : null;
  }),
  diff.resharded.length ? section("Shardings", "arguments and results that lie otherwise", table([
    { name: "tensor", text: (r) => r.name, node: (r) => el("code", {}, r.name), className: "wrap" },
    { name: "before", text: (r) => r.before || "none" }, { name: "after", text: (r) => r.after || "none" },
  ], diff.resharded)) : null,
  diff.appeared.length ? section("New findings", null, diffFindings(diff.appeared)) : null,
  diff.gone.length ? section("Findings that are gone", null, diffFindings(diff.gone)) : null));
}

startDiff(JSON.parse(document.getElementById("data").textContent));
