// Tables that sort by a click on a header, and show the rest of their rows on demand.

const FIRST = 200;

// columns: {name, text(row), key(row)?, right?, className?, node(row)?}; choose(row): on click or Enter.
function table(columns, rows, { sort = null, caption = "", choose = null, empty = "none", className = "" } = {}) {
  let order = rows.slice(), shown = FIRST, by = null, down = true;
  const body = el("tbody");
  const heads = columns.map((column, i) => el("th", { scope: "col", class: column.right ? "right" : null },
    el("button", { type: "button", class: "sort", onclick: () => sortBy(i) }, column.name)));
  const more = el("button", { type: "button", class: "more", onclick: () => { shown = Infinity; draw(); } });
  const root = el("div", { class: `table ${className}`.trim() },
    el("table", {}, caption ? el("caption", {}, caption) : null, el("thead", {}, el("tr", {}, heads)), body), more);

  function sortBy(i) {
    down = by === i ? !down : Boolean(columns[i].right);
    by = i;
    const key = columns[i].key || columns[i].text;
    order.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
    });
    heads.forEach((head, j) => {
      if (j === i) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    draw();
  }

  function draw() {
    body.replaceChildren(...order.slice(0, shown).map((row) => {
      const line = el("tr", choose ? { class: "pick", tabindex: 0, onclick: () => choose(row) } : {},
        columns.map((c) => el("td", { class: [c.right ? "right" : "", c.className || ""].join(" ").trim() || null },
          c.node ? c.node(row) : c.text(row))));
      if (choose) line.addEventListener("keydown", (e) => { if (e.key === "Enter") choose(row); });
      return line;
    }));
    if (!order.length) body.append(el("tr", {}, el("td", { colspan: columns.length, class: "muted" }, empty)));
    more.hidden = order.length <= shown;
    more.textContent = `Show all ${count(order.length)} rows`;
  }

  root.setRows = (given) => {
    order = given.slice();
    if (by === null) draw();
    else { down = !down; sortBy(by); }
  };
  if (sort === null) draw();
  else sortBy(sort);
  return root;
}
