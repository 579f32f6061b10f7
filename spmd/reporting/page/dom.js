// Elements. Text is set as text: nothing of a report is ever read as markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "css") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else if (name === "value") node.value = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(3)) if (child !== null && child !== undefined && child !== false) node.append(child);
  return node;
}

const el = (tag, props, ...children) => fill(document.createElement(tag), props, children);
const svg = (tag, props, ...children) => fill(document.createElementNS(SVG, tag), props, children);

function section(title, note, ...children) {
  return el("section", { class: "panel" },
    el("h2", {}, title, note ? el("span", { class: "note" }, note) : null), ...children);
}

// Radio buttons that look like one control. `choose(value)` is called with the chosen one.
function choice(label, options, value, choose) {
  const buttons = options.map(([key, text]) => el("button", {
    type: "button", role: "radio", "aria-checked": String(key === value), "data-key": key,
    tabindex: key === value ? 0 : -1, onclick: () => set(key),
  }, text));
  function set(key) {
    for (const b of buttons) {
      const on = b.dataset.key === key;
      b.setAttribute("aria-checked", String(on));
      b.tabIndex = on ? 0 : -1;
    }
    choose(key);
  }
  const group = el("div", { class: "choice", role: "radiogroup", "aria-label": label }, buttons);
  group.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = buttons.indexOf(document.activeElement);
    const next = buttons[(at + step + buttons.length) % buttons.length];
    next.focus();
    set(next.dataset.key);
  });
  return group;
}

function swatch(color) {
  return el("i", { class: "swatch", css: { background: color } });
}

// Tints of the accent, from strong to faint: series of one chart.
function tint(i, n) {
  const share = n < 2 ? 100 : Math.round(100 - (78 * i) / (n - 1));
  return `color-mix(in oklab, var(--accent) ${share}%, var(--neutral))`;
}
