// The pages' behaviour: theme, filters, sorting, the Pareto plot and the details of a row.
// Everything shown is set as text, never as HTML; nothing is loaded from anywhere.
"use strict";
(() => {
const $ = (id) => document.getElementById(id);

// --- theme: the system's, until the reader chooses -------------------------------------------
const storage = (() => { try { return window.localStorage; } catch { return null; } })();
const root = document.documentElement;
const isDark = () => root.style.colorScheme
  ? root.style.colorScheme === "dark"
  : matchMedia("(prefers-color-scheme: dark)").matches;
const applyTheme = (theme) => {
  if (theme) root.style.colorScheme = theme;
  $("theme").setAttribute("aria-pressed", String(isDark()));
};
applyTheme(storage?.getItem("replivit-theme"));
$("theme").addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  storage?.setItem("replivit-theme", theme);
  applyTheme(theme);
});

const source = $("data");
if (!source) return;
const data = JSON.parse(source.textContent);
const column = Object.fromEntries(data.columns.map((one) => [one.key, one]));
const body = $("rows");
const lines = [...body.rows].map((line) => ({ line, row: data.rows[line.dataset.row] }));
let sorting = { key: null, down: false };  // null: the order the page came in

const make = (tag, text, cls) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (cls) node.className = cls;
  return node;
};
const view = () => Number($("view").value);
const cellOf = (row, key) =>
  (column[key].speed ? row.speeds[view()] : row.fixed)?.[key] ?? null;
const fronts = () => data.fronts[view()] ?? data.fronts[0] ?? {};
const chance = (row) => {
  const [x, y] = [$("x").value, $("y").value];
  const list = fronts()[`${x}|${y}`] ?? fronts()[`${y}|${x}`];
  return list ? list[row.index] : null;
};
const standing = (p) => (p === null || p <= 0.05 ? "" : p >= 0.95 ? "front" : `tie ${Math.round(100 * p)} %`);

// --- the table -------------------------------------------------------------------------------
function fill(td, cell) {
  td.replaceChildren();
  if (!cell) return td.append(make("span", "–", "none"));
  td.append(make("span", cell.text, cell.published ? "value published" : "value"));
  if (cell.interval) td.append(make("small", cell.interval));
  if (cell.mark) {
    const mark = make("small", cell.mark, "mark " + cell.status);
    mark.title = cell.why;
    td.append(mark);
  }
}

function fillView() {
  for (const { line, row } of lines)
    for (const td of line.querySelectorAll("td[data-speed]")) fill(td, cellOf(row, td.dataset.key));
}

function fillFront() {
  for (const { line, row } of lines) {
    const word = standing(chance(row));
    const td = line.querySelector("td.front");
    td.replaceChildren(make("span", word, word ? word.split(" ")[0] : ""));
  }
}

const valueOf = (row, key) =>
  key === "name" ? row.name : key === "front" ? chance(row) : cellOf(row, key)?.v ?? null;

function sortRows() {
  const { key, down } = sorting;
  if (key === null) return;
  const sign = down ? -1 : 1;
  lines.sort((a, b) => {
    const [va, vb] = [valueOf(a.row, key), valueOf(b.row, key)];
    if (va === null || vb === null) return (va === null) - (vb === null);  // missing stays last
    const order = typeof va === "string" ? va.localeCompare(vb, "en", { numeric: true }) : va - vb;
    return sign * order || a.row.index - b.row.index;
  });
  body.append(...lines.map((one) => one.line));
}

for (const button of document.querySelectorAll("th button[data-key]")) {
  button.addEventListener("click", () => {
    const key = button.dataset.key;
    const bestFirst = key === "front" || column[key]?.up === true;
    sorting = { key, down: sorting.key === key ? !sorting.down : bestFirst };
    for (const th of document.querySelectorAll("th[aria-sort]")) th.removeAttribute("aria-sort");
    button.closest("th").setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
    sortRows();
  });
}

function filterRows() {
  const words = $("text").value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const { line, row } of lines) {
    const fits = ["track", "family", "paper"].every((one) => !$(one).value || row[one] === $(one).value);
    const hay = `${row.name} ${row.paper} ${row.family} ${row.track}`.toLowerCase();
    line.hidden = !(fits && words.every((word) => hay.includes(word)));
    shown += !line.hidden;
  }
  $("count").textContent = `${shown} of ${lines.length} rows`;
  $("nothing").hidden = shown > 0;
}

// --- machine, device and setting: three selects that name one view ---------------------------
function chooseView(changed) {
  const wanted = { machine: $("machine").value, device: $("device").value };
  if (changed === "view") return refresh();
  const fits = (one) => one.machine === wanted.machine && one.device === wanted.device;
  const here = data.views.find(fits) ?? data.views.find((one) => one[changed] === wanted[changed]);
  const old = data.views[view()]?.setting;
  const best = data.views.find((one) => fits(one) && one.setting === old) ?? here;
  if (best) $("view").value = best.index;
  listSettings();
  refresh();
}

function listSettings() {
  const chosen = data.views[view()];
  if (!chosen) return;
  $("machine").value = chosen.machine;
  $("device").value = chosen.device;
  for (const option of $("view").options) {
    const one = data.views[option.value];
    option.hidden = option.disabled = one.machine !== chosen.machine || one.device !== chosen.device;
  }
}

// --- the plot --------------------------------------------------------------------------------
const svgNS = "http://www.w3.org/2000/svg";
const draw = (tag, attributes, parent, text) => {
  const node = document.createElementNS(svgNS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent?.append(node);
  return node;
};
const SHAPES = {
  transformer: (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
  hybrid: (r) => `M${-r},${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  cnn: (r) => `M0,${-1.2 * r}L${1.2 * r},${r}H${-1.2 * r}z`,
};
const OTHER = (r) => `M0,${-1.3 * r}L${1.3 * r},0L0,${1.3 * r}L${-1.3 * r},0z`;
const familyClass = (family) => (family in SHAPES ? family : "other");

// A scale maps a number to a pixel; costs are logarithmic, shares of right answers linear.
function scaleOf(key, values, from, to) {
  const log = !column[key].up && Math.min(...values) > 0;
  const f = log ? Math.log10 : (v) => v;
  let [low, high] = [f(Math.min(...values)), f(Math.max(...values))];
  const pad = (high - low || Math.abs(high) || 1) * 0.07;
  [low, high] = [low - pad, high + pad];
  const map = (v) => from + ((f(v) - low) / (high - low)) * (to - from);
  const ticks = [];
  if (log) {
    const steps = high - low > 3 ? [1] : high - low > 1 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
    for (let e = Math.floor(low); e <= high; e++)
      for (const m of steps) ticks.push(m * 10 ** e);
  } else {
    const raw = (high - low) / 7, unit = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((m) => m * unit >= raw) * unit;
    for (let v = Math.ceil(low / step) * step; v <= high; v += step) ticks.push(v);
  }
  return { map, ticks: ticks.filter((v) => f(v) >= low && f(v) <= high) };
}
const short = (v) => String(Number(v.toPrecision(3)));

function plottedRows(x, y) {
  const topOne = x === "top1" || y === "top1";
  const visible = lines.filter(({ line }) => !line.hidden).map(({ row }) => row);
  const usable = visible.filter((row) => [x, y].every((key) => cellOf(row, key)?.v != null));
  const tracks = [...new Set(usable.map((row) => row.track))];
  const count = (track) => usable.filter((row) => row.track === track).length;
  tracks.sort((a, b) => count(b) - count(a));
  const mixed = topOne && tracks.length > 1;
  return {
    points: mixed ? usable.filter((row) => row.track === tracks[0]) : usable,
    note: mixed ? `Only ${tracks[0]} is drawn: top-1 of different tracks does not compare.` : "",
  };
}

function drawPlot() {
  const box = $("plot"), [x, y] = [$("x").value, $("y").value];
  const { points, note } = plottedRows(x, y);
  box.replaceChildren();
  hideTip();
  $("plot-note").textContent = points.length
    ? note
    : "No row here has both numbers; choose other axes or fewer filters.";
  if (!points.length) return;
  const width = Math.max(box.clientWidth, 280);
  const height = Math.round(Math.min(480, Math.max(300, width * 0.52)));
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group",
    "aria-label": `${column[y].label} against ${column[x].label}; arrow keys move between models` }, box);
  const ends = (key) => points.flatMap((row) => { const c = cellOf(row, key); return [c.lo ?? c.v, c.hi ?? c.v]; });
  const [left, bottom] = [52, height - 44];
  const sx = scaleOf(x, ends(x), left, width - 12), sy = scaleOf(y, ends(y), bottom, 12);
  let lastTick = -Infinity;
  for (const v of sx.ticks) {
    const px = sx.map(v);
    draw("line", { x1: px, x2: px, y1: 12, y2: bottom, class: "grid" }, svg);
    if (px - lastTick < 38) continue;
    lastTick = px;
    draw("text", { x: px, y: bottom + 16, "text-anchor": "middle" }, svg, short(v));
  }
  for (const v of sy.ticks) {
    draw("line", { x1: left, x2: width - 12, y1: sy.map(v), y2: sy.map(v), class: "grid" }, svg);
    draw("text", { x: left - 7, y: sy.map(v) + 4, "text-anchor": "end" }, svg, short(v));
  }
  const arrow = (key) => (column[key].up ? "more is better" : "less is better");
  draw("text", { x: (left + width - 12) / 2, y: height - 8, "text-anchor": "middle", class: "axis" },
    svg, `${column[x].heading}, ${arrow(x)}`);
  draw("text", { transform: `translate(13 ${bottom / 2 + 6}) rotate(-90)`, "text-anchor": "middle", class: "axis" },
    svg, `${column[y].heading}, ${arrow(y)}`);

  const spots = points.map((row) => ({ row, p: chance(row) ?? 0, cx: cellOf(row, x), cy: cellOf(row, y),
    px: sx.map(cellOf(row, x).v), py: sy.map(cellOf(row, y).v) }));
  for (const track of new Set(points.map((row) => row.track))) {  // a front joins one track only
    const front = spots.filter((s) => s.p >= 0.5 && s.row.track === track).sort((a, b) => a.px - b.px);
    if (front.length < 2) continue;
    // Steps: between two models nothing better is known than the one within the budget.
    const steps = front.slice(1).map((s) => (column[x].up ? `V${s.py}H${s.px}` : `H${s.px}V${s.py}`));
    draw("path", { d: `M${front[0].px},${front[0].py}${steps.join("")}`, class: "likely" }, svg);
  }
  spots.sort((a, b) => a.px - b.px || a.py - b.py);
  spots.forEach((spot, i) => drawPoint(svg, spot, i, spots, sx, sy));
  drawLabels(svg, spots, left, width, bottom);
}

function drawPoint(svg, { row, p, cx, cy, px, py }, index, spots, sx, sy) {
  const word = standing(p);
  const group = draw("g", { class: `point ${familyClass(row.family)} ${word.split(" ")[0] || "beaten"}`,
    tabindex: index ? -1 : 0, role: "button", transform: `translate(${px} ${py})` }, svg);
  const state = word === "front" ? "on the front" : word ? `${word} for the front` : "not on the front";
  const say = (key, cell) => `${column[key].heading} ${cell.text}${cell.interval ? ` (${cell.interval})` : ""}${cell.mark ? ", " + cell.mark : ""}`;
  const texts = [row.name, say($("x").value, cx), say($("y").value, cy), state];
  group.setAttribute("aria-label", texts.join("; "));
  if (cx.lo != null) draw("line", { x1: sx.map(cx.lo) - px, x2: sx.map(cx.hi) - px, class: "bar" }, group);
  if (cy.lo != null) draw("line", { y1: sy.map(cy.lo) - py, y2: sy.map(cy.hi) - py, class: "bar" }, group);
  draw("circle", { r: 12, class: "hit" }, group);
  draw("path", { d: (SHAPES[row.family] ?? OTHER)(5.5), class: cy.published || cx.published ? "hollow" : "" }, group);
  const enter = () => showTip(texts, px, py, row);
  group.addEventListener("pointerenter", enter);
  group.addEventListener("focus", enter);
  group.addEventListener("pointerleave", hideTip);
  group.addEventListener("blur", hideTip);
  group.addEventListener("click", () => showDetails(row));
  group.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); showDetails(row); }
    if (event.key === "Escape") hideTip();
    if (!step) return;
    event.preventDefault();
    const nodes = [...svg.querySelectorAll(".point")];
    const next = nodes[(index + step + nodes.length) % nodes.length];
    group.setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus();
  });
}

// Names stand where they fit, the front's first; the others are a hover or an arrow key away.
function drawLabels(svg, spots, left, width, bottom) {
  const ruler = document.createElement("canvas").getContext("2d");
  ruler.font = "12px system-ui, sans-serif";
  const taken = spots.map(({ px, py }) => [px - 7, py - 7, px + 7, py + 7]);
  const free = (b) => b[0] >= left && b[2] <= width - 2 && b[1] >= 2 && b[3] <= bottom &&
    taken.every((t) => b[2] < t[0] || b[0] > t[2] || b[3] < t[1] || b[1] > t[3]);
  for (const { row, px, py } of [...spots].sort((a, b) => b.p - a.p)) {
    const w = ruler.measureText(row.name).width * 1.06 + 2;
    const corners = [[px + 9, py - 7], [px - 9 - w, py - 7], [px - w / 2, py - 22], [px - w / 2, py + 9],
      [px + 7, py - 19], [px + 7, py + 6], [px - 7 - w, py - 19], [px - 7 - w, py + 6]];
    const place = corners.map(([l, t]) => [l, t, l + w, t + 14]).find(free);
    if (!place) continue;
    taken.push(place);
    draw("text", { x: place[0] + 1, y: place[1] + 11, class: "name", "aria-hidden": "true" }, svg, row.name);
  }
}

function showTip(texts, px, py, row) {
  const tip = $("tip");
  tip.replaceChildren(make("b", texts[0]), ...texts.slice(1).map((text) => make("span", text)));
  tip.hidden = false;
  const room = $("plot").clientWidth - tip.offsetWidth;
  tip.style.left = `${Math.max(0, Math.min(room, px - tip.offsetWidth / 2))}px`;
  tip.style.top = `${py > tip.offsetHeight + 20 ? py - tip.offsetHeight - 14 : py + 16}px`;
  for (const one of lines) one.line.classList.toggle("hot", one.row === row);
}
function hideTip() {
  $("tip").hidden = true;
  for (const { line } of lines) line.classList.remove("hot");
}

// --- details: where every number of a row came from ------------------------------------------
function showDetails(row) {
  $("details-title").textContent = row.name;
  const parts = [];
  for (const one of data.columns) {
    const cell = cellOf(row, one.key);
    if (!cell) continue;
    const part = make("details");
    const head = make("summary", `${one.label}: ${cell.text} ${cell.status === "ok" ? one.unit : ""}`);
    if (cell.interval) head.append(make("small", ` ${cell.interval}`));
    if (cell.mark) head.append(make("small", ` ${cell.mark}`, "mark " + cell.status));
    part.append(head);
    if (cell.why) part.append(make("p", cell.why));
    for (const number of cell.records) {
      const list = make("dl"), record = data.records[number];
      for (const [label, text] of record.facts)
        list.append(make("dt", label), make("dd", data.texts[text]));
      list.append(make("dt", "measure again"), make("dd", record.command, "command"));
      part.append(list);
    }
    parts.push(part);
  }
  $("details-body").replaceChildren(...(parts.length ? parts : [make("p", "Nothing is measured yet.")]));
  $("details").showModal();
}
$("details-close").addEventListener("click", () => $("details").close());
body.addEventListener("click", (event) => {
  const button = event.target.closest("button.more");
  if (button) showDetails(data.rows[button.closest("tr").dataset.row]);
});

// --- wiring ----------------------------------------------------------------------------------
function refresh() { fillView(); fillFront(); sortRows(); drawPlot(); }
function filter() { filterRows(); drawPlot(); }
for (const id of ["track", "family", "paper"]) $(id).addEventListener("change", filter);
$("text").addEventListener("input", filter);
for (const id of ["machine", "device", "view"]) $(id).addEventListener("change", () => chooseView(id));
for (const id of ["x", "y"]) $(id).addEventListener("change", () => { fillFront(); sortRows(); drawPlot(); });
$("reset").addEventListener("click", () => {
  for (const id of ["track", "family", "paper", "text"]) $(id).value = "";
  filter();
});
let frame = 0;
new ResizeObserver(() => { cancelAnimationFrame(frame); frame = requestAnimationFrame(drawPlot); }).observe($("plot-box"));
listSettings();
filterRows();
refresh();
})();
