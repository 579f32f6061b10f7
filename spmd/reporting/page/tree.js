// A tree with columns. Only the lines in sight are in the document, and children are made when a
// node is opened, so that its size does not matter.

const LINE = 24; // height of a line in pixels, as in page.css
const SPARE = 12; // lines drawn beyond the edges

// A node: {label, mark?, cells, share, children: null or () => nodes, data}.
class Tree {
  constructor(columns, label, choose) {
    this.columns = columns;
    this.choose = choose;
    this.lines = [];
    this.at = 0;
    this.lineOf = new Map();
    this.space = el("div", { class: "space" });
    this.view = el("div", { class: "lines", role: "treegrid", "aria-label": label, tabindex: 0 },
      el("div", { class: "line head", role: "row" }, el("span", { class: "label", role: "columnheader" }, "operation"),
        columns.map((c) => el("span", { class: "cell", title: c.title, role: "columnheader" }, c.name))),
      this.space);
    this.root = el("div", { class: "tree", css: { "--wide": columns.map((c) => c.width).join(" "), "--narrow": columns.map((c) => c.narrow || "0px").join(" ") } }, this.view);
    this.view.addEventListener("scroll", () => this.draw());
    this.view.addEventListener("keydown", (event) => this.key(event));
    this.view.addEventListener("click", (event) => this.click(event));
    new ResizeObserver(() => this.draw()).observe(this.view);
  }

  // open(node): whether it starts open.
  setRoots(nodes, open = () => false) {
    this.lines = [];
    const add = (list, depth) => {
      for (const node of list) {
        const line = { node, depth, open: Boolean(node.children) && open(node, depth) };
        this.lines.push(line);
        if (line.open) add(node.children(), depth + 1);
      }
    };
    add(nodes, 0);
    this.at = 0;
    this.view.scrollTop = 0;
    this.draw();
  }

  draw() {
    const top = Math.max(Math.floor(this.view.scrollTop / LINE) - SPARE, 0);
    const end = Math.min(top + Math.ceil(this.view.clientHeight / LINE) + 2 * SPARE, this.lines.length);
    const drawn = [];
    for (let i = top; i < end; i++) drawn.push(this.drawLine(this.lines[i], i));
    this.space.style.height = `${this.lines.length * LINE}px`;
    this.view.setAttribute("aria-rowcount", this.lines.length);
    this.space.replaceChildren(...drawn);
    if (this.lines.length) this.view.setAttribute("aria-activedescendant", `line-${this.at}`);
    else this.space.append(el("p", { class: "muted none" }, "nothing found"));
  }

  drawLine(line, i) {
    const { node } = line;
    const twist = node.children ? el("span", { class: "twist", "aria-hidden": "true" }, line.open ? "▾" : "▸") : el("span", { class: "twist" });
    return el("div", {
      class: `line${i === this.at ? " at" : ""}`, id: `line-${i}`, role: "row", "data-line": i, "aria-level": line.depth + 1,
      "aria-expanded": node.children ? String(line.open) : null, "aria-selected": String(i === this.at),
      css: { top: `${i * LINE}px` },
    },
    el("span", { class: "label", role: "gridcell", css: { "padding-left": `${8 + line.depth * 14}px` }, title: node.title || node.label },
      twist, node.mark ? el("b", { class: "mark" }, node.mark) : null, el("span", { class: node.kind || null }, node.label), node.note ? el("span", { class: "muted" }, node.note) : null),
    node.cells.map((text, c) => el("span", { class: `cell ${this.columns[c].className || ""}`, role: "gridcell", title: this.columns[c].long ? text : null },
      this.columns[c].bar && node.share > 0.002 ? el("i", { class: "heat", css: { width: `${Math.min(100 * node.share, 100)}%` } }) : null,
      el("span", {}, text))));
  }

  toggle(i) {
    const line = this.lines[i];
    if (!line || !line.node.children) return;
    if (line.open) {
      let end = i + 1;
      while (end < this.lines.length && this.lines[end].depth > line.depth) end++;
      this.lines.splice(i + 1, end - i - 1);
      if (this.at > i) this.at = this.at < end ? i : this.at - (end - i - 1);
    } else {
      const inner = line.node.children().map((node) => ({ node, depth: line.depth + 1, open: false }));
      this.lines = [...this.lines.slice(0, i + 1), ...inner, ...this.lines.slice(i + 1)];
      if (this.at > i) this.at += inner.length;
    }
    line.open = !line.open;
    this.draw();
  }

  go(i) {
    if (!this.lines.length) return;
    this.at = Math.min(Math.max(i, 0), this.lines.length - 1);
    const top = this.at * LINE, { clientHeight } = this.view;
    if (top < this.view.scrollTop) this.view.scrollTop = top;
    else if (top + 2 * LINE > this.view.scrollTop + clientHeight) this.view.scrollTop = top + 2 * LINE - clientHeight; // below the head
    this.draw();
    this.choose(this.lines[this.at].node);
  }

  click(event) {
    const target = event.target.closest("[data-line]");
    if (!target) return;
    const i = Number(target.dataset.line);
    this.go(i);
    if (event.target.closest(".label")) this.toggle(i);
  }

  key(event) {
    const line = this.lines[this.at];
    if (!line || event.ctrlKey || event.metaKey || event.altKey) return;
    const page = Math.max(Math.floor(this.view.clientHeight / LINE) - 1, 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.key in moves) this.go(this.at + moves[event.key]);
    else if (event.key === "ArrowRight") line.node.children && !line.open ? this.toggle(this.at) : this.go(this.at + 1);
    else if (event.key === "ArrowLeft") line.open ? this.toggle(this.at) : this.go(this.parent(this.at));
    else if (event.key === "Enter" || event.key === " ") this.toggle(this.at);
    else return;
    event.preventDefault();
  }

  parent(i) {
    const { depth } = this.lines[i];
    while (i > 0 && this.lines[i].depth >= depth && depth > 0) i--;
    return i;
  }
}
