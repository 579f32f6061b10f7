// Arguments and results.

function tensorsView(report, showOnMesh) {
  const rows = [...report.arguments, ...report.results.map((t) => ({ ...t, kind: "result" }))];
  const pick = (t) => showOnMesh({ name: t.name, type: `${t.dtype}[${t.shape.join(",")}]`, shape: t.shape, sharding: t.sharding });
  const found = table([
    { name: "kind", text: (t) => t.kind },
    { name: "name", text: (t) => t.name, node: (t) => el("code", {}, t.name), className: "wrap" },
    { name: "type", text: (t) => `${t.dtype}[${t.shape.join(",")}]` },
    { name: "sharding", text: (t) => t.sharding, node: (t) => el("code", {}, t.sharding) },
    { name: "bytes per device", text: (t) => bytesText(t.bytes), key: (t) => t.bytes, right: true },
  ], rows, { choose: pick });
  const filter = el("input", {
    type: "search", placeholder: "Filter by name, kind, sharding", "aria-label": "filter tensors",
    oninput: () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      found.setRows(rows.filter((t) => words.every((w) => `${t.kind} ${t.name} ${t.dtype} ${t.sharding}`.toLowerCase().includes(w))));
    },
  });
  return section("Arguments and results", "choose a row to see it on the mesh", el("div", { class: "tools" }, filter), found);
}
