// The panel beside the picture: the chosen cell, its way through the depths, its fate under compression, the legend.
const LINES = 4;  // words that are followed through the depths
const LEGEND = 20;

function percent(value) { return value < 0.0005 ? "< 0.001" : value.toFixed(3); }
function bdi(parent, text) { return make(parent, "bdi", {}, text); }
function button(parent, label, act, attributes = {}) {
  const element = make(parent, "button", { type: "button", ...attributes });
  bdi(element, label);
  element.addEventListener("click", act);
  return element;
}

function placeText(series, cell) {
  const tile = series.thumbnails[series.block[cell]] ? "thumbnail" : `tile ${series.block[cell] + 1}`;
  return `row ${series.row[cell] + 1}, column ${series.column[cell] + 1}` + (series.grids.length > 1 ? `, ${tile}` : "");
}

function showDetails(view, cell) {
  const details = byId("details");
  details.replaceChildren();
  const { series, point } = view;
  bdi(make(details, "h2"), data.words[series.word(point, cell)]);
  make(details, "p", { class: "note" }, `${placeText(series, cell)}; ${pointText(series, point) || `token ${cell}`}`);
  const table = make(details, "table", { "aria-label": "Best readings of the cell" });
  for (let rank = 0; rank < series.k; rank += 1) {
    const entry = series.entry(point, cell, rank);
    const word = data.words[series.wordOf[entry]];
    const line = make(table, "tr");
    const label = (series.blank[entry] === "1" ? "␣" : "") + word;
    button(make(line, "td", { title: `vocabulary id ${series.ids[entry]}` }), label, () => search(word), { class: "bare" });
    const probability = series.probability(point, cell, rank);
    if (probability === null) { make(line, "td", { class: "number" }, `id ${series.ids[entry]}`); continue; }
    make(make(line, "td", { class: "share" }), "meter", { value: probability, "aria-hidden": "true" });
    make(line, "td", { class: "number" }, percent(probability));
  }
}

// Probability of a word at a point: the sum over its spellings among the best readings.
function wordProbability(series, point, cell, word) {
  let sum = 0;
  for (let rank = 0; rank < series.k; rank += 1) {
    if (series.word(point, cell, rank) === word) sum += series.probability(point, cell, rank) ?? (rank === 0 ? 1 : 0);
  }
  return Math.min(sum, 1);
}

// Words that are likely somewhere on the way, the one that reads best now first.
function followed(series, path, cell, now) {
  const best = new Map([[now, 2]]);
  for (const point of path) {
    for (let rank = 0; rank < series.k; rank += 1) {
      const word = series.word(point, cell, rank);
      best.set(word, Math.max(best.get(word) || 0, wordProbability(series, point, cell, word)));
    }
  }
  return [...best].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, LINES).map(([word]) => word);
}

function showPaths(view, cell) {
  const paths = byId("paths");
  const open = new Set([...paths.querySelectorAll("details[open]")].map((item) => item.dataset.axis));
  paths.replaceChildren();
  if (view.series.nats === null) return;
  for (const [name, axis] of AXES) {
    const path = view.series.along(view.point, axis);
    if (path.length > 1) drawPath(paths, view, cell, name, axis, path, open.has(String(axis)));
  }
}

function drawPath(parent, view, cell, name, axis, path, open) {
  const { series } = view;
  make(parent, "h3", {}, `Through the ${name}`);
  const words = followed(series, path, cell, series.word(view.point, cell));
  const [width, height, left, bottom] = [300, 96, 24, 16];
  const x = (at) => left + at * (width - left - 6) / (path.length - 1);
  const y = (value) => 4 + (1 - value) * (height - bottom - 4);
  const svg = make(parent, "svg:svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `Probability of ${words.map((word) => data.words[word]).join(", ")} by depth; the numbers are in the table below` });
  make(svg, "svg:path", { class: "axis", d: `M${left} 4V${y(0)}H${width - 6}` });
  for (const value of [0, 1]) make(svg, "svg:text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, value);
  const label = (at) => series.points[path[at]][axis] ?? "con.";
  const apart = Math.ceil(path.length / 12);
  path.forEach((_, at) => { if (at % apart === 0) make(svg, "svg:text", { x: x(at), y: height - 3, "text-anchor": "middle" }, label(at)); });
  const now = path.indexOf(view.point);
  if (now >= 0) make(svg, "svg:path", { class: "now", d: `M${x(now)} 4V${y(0)}` });
  const values = words.map((word) => path.map((point) => wordProbability(series, point, cell, word)));
  values.forEach((line, number) => make(svg, "svg:polyline", { class: `line c${number}`,
    points: line.map((value, at) => `${x(at).toFixed(1)},${y(value).toFixed(1)}`).join(" ") }));
  path.forEach((point, at) => {
    const wide = (width - left) / path.length;
    make(svg, "svg:rect", { class: "hit", x: x(at) - wide / 2, y: 0, width: wide, height }).addEventListener("click", () => view.go(point));
  });
  const keyed = make(parent, "div", { class: "keyed" });
  words.forEach((word, number) => {
    const item = make(keyed, "span");
    const sign = make(item, "svg:svg", { width: 24, height: 8, "aria-hidden": "true" });
    make(sign, "svg:path", { class: `chart line c${number}`, d: "M0 4H24", "stroke-width": 2.2 });
    bdi(item, data.words[word]);
  });
  const details = make(parent, "details", { "data-axis": axis });
  details.open = open;
  make(details, "summary", {}, "Every depth");
  pathTable(make(details, "table"), view, cell, axis, path);
}

function pathTable(table, view, cell, axis, path) {
  for (const point of path) {
    const line = make(table, "tr", point === view.point ? { class: "here" } : {});
    const depth = view.series.points[point][axis];
    button(make(line, "td"), depth === null ? "connector" : String(depth), () => view.go(point), { class: "bare" });
    bdi(make(line, "td"), data.words[view.series.word(point, cell)]);
    make(line, "td", { class: "number" }, percent(view.series.probability(point, cell)));
  }
}

function showFate(view, cell) {
  const fate = byId("fate");
  fate.replaceChildren();
  const { series, point } = view;
  if (!series.plans.length) return;
  const [vision, llm] = series.points[point];
  const own = llm === null && (vision === null || vision === series.native);
  make(fate, "h3", {}, own ? "Compression, as the model plans it" : "Compression at these depths");
  const table = make(fate, "table");
  const head = make(table, "tr");
  for (const [text, kind] of [["method", ""], ["tokens", "number"], ["this cell", ""]]) make(head, "th", { class: kind, scope: "col" }, text);
  series.plans.forEach((plan, number) => {
    const line = make(table, "tr", number === view.mode ? { class: "here" } : {});
    button(make(line, "td"), plan.name, () => { view.mode = view.mode === number ? -1 : number; view.build(); changed(); }, { class: "bare" });
    const left = series.left(plan, point);
    make(line, "td", { class: "number", title: `${left} of ${series.cells}` }, `${left} (−${Math.round(100 * (1 - left / series.cells))} %)`);
    if (cell === null) { make(line, "td", {}, ""); return; }
    const run = series.run(plan, point, cell);
    make(line, "td", {}, !run.kept ? "dropped" : run.length > 1 ? `1 of ${run.length} merged` : "kept");
  });
}

function showLegend(view) {
  const legend = byId("legend");
  legend.replaceChildren();
  const counts = new Map();
  for (let cell = 0; cell < view.series.cells; cell += 1) {
    const word = view.series.word(view.point, cell);
    if (meaningful(word)) counts.set(word, (counts.get(word) || 0) + 1);
  }
  for (const [word, count] of [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, LEGEND)) {
    const text = data.words[word];
    const pressed = state.query.toLowerCase() === text.toLowerCase();
    const item = make(legend, "button", { type: "button", "aria-pressed": pressed });
    make(item, "i").style.background = data.colours[word] || "#969696";
    bdi(item, text);
    item.append(` ${count}`);
    item.addEventListener("click", () => search(pressed ? "" : text));
  }
}
