// Horizontal bars.

// One bar of several parts: [name, value]. With a legend below that has the numbers.
function stacked(parts, text, label) {
  const total = parts.reduce((sum, [, n]) => sum + n, 0);
  const present = parts.filter(([, n]) => n > 0);
  const bar = el("div", { class: "stack", role: "img", "aria-label": `${label}: ${present.map(([name, n]) => `${name} ${text(n)}`).join(", ")}` },
    present.map(([name, n], i) => el("i", {
      title: `${name}: ${text(n)}`, css: { "flex-grow": n / total, background: tint(i, present.length) },
    })));
  const legend = el("table", { class: "legend" }, el("tbody", {}, parts.map(([name, n]) => {
    const at = present.findIndex(([other]) => other === name);
    return el("tr", { class: n ? null : "muted" },
      el("td", {}, swatch(at < 0 ? "transparent" : tint(at, present.length)), name),
      el("td", { class: "right" }, text(n)),
      el("td", { class: "right muted" }, total ? percentText(n / total) : ""));
  })));
  return el("div", {}, bar, legend);
}

// Bars of {name, strong, faint}: what is exposed, and what is hidden. All on one scale.
function bars(rows, text, { strong, faint = "", name }) {
  const most = Math.max(...rows.map((r) => r.strong + r.faint), 0) || 1;
  const key = faint ? el("p", { class: "key" }, swatch("var(--accent)"), strong, swatch("var(--faint)"), faint) : null;
  return el("div", { class: "bars" }, key, el("table", {}, el("tbody", {}, rows.map((row) => el("tr", {},
    el("th", { scope: "row", title: row.name }, ending(row.name, 36)),
    el("td", { class: "bar" }, el("div", { class: "track", role: "img", "aria-label": `${name} ${row.name}: ${strong} ${text(row.strong)}${faint ? `, ${faint} ${text(row.faint)}` : ""}` },
      el("i", { css: { width: `${(100 * row.strong) / most}%`, background: "var(--accent)" } }),
      el("i", { css: { width: `${(100 * row.faint) / most}%`, background: "var(--faint)" } }))),
    el("td", { class: "right" }, text(row.strong + row.faint)),
    faint ? el("td", { class: "right muted" }, row.strong ? `${text(row.strong)} ${strong}` : `all ${faint}`) : null)))));
}

// The last parts of a path: what tells modules apart.
function ending(path, most) {
  const parts = path.split("/");
  while (parts.length > 1 && parts.join("/").length > most) parts.shift();
  const text = parts.join("/");
  return text.length < path.length ? `…/${text}` : text;
}
