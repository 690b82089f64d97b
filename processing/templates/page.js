// What is chosen, and what happens on a key, a click or a change.
const state = { cell: null, hover: null, query: "" };  // cell and hover: {series, cell, thumbnail}
const views = [];

function say(text) { byId("said").textContent = text; }

// The cell of a view that looks at the middle of a chosen cell.
function mapped(chosen, view) {
  if (chosen === null) return null;
  if (chosen.series === view.series && chosen.thumbnail === view.thumbnail) return chosen.cell;
  const [x1, y1, x2, y2] = chosen.series.box(chosen.cell);
  return view.series.cellAt((x1 + x2) / 2, (y1 + y2) / 2, view.thumbnail);
}

let active = null;  // the view that the panel speaks of
function refreshPanel() {
  const cell = mapped(state.hover ?? state.cell, active);
  if (cell === null) {
    byId("details").replaceChildren();
    make(byId("details"), "p", { class: "note" }, "Point at a cell, or choose one with a click or the arrow keys, to see what it reads.");
    byId("paths").replaceChildren();
  } else {
    showDetails(active, cell);
    showPaths(active, cell);
  }
  showFate(active, cell);
}

function changed() {
  for (const view of views) view.stage.draw();
  refreshPanel();
  showLegend(active);
  showHits();
  showAgreement();
}

let pending = false;
function hover(view, cell) {
  const before = state.hover;
  if ((before && before.cell) === cell && (!before || before.series === view.series)) return;
  state.hover = cell === null ? null : { series: view.series, cell, thumbnail: view.thumbnail };
  if (cell !== null) active = view;
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => {
    pending = false;
    for (const other of views) other.stage.point();
    refreshPanel();
  });
}

function choose(view, cell) {
  const moved = active !== view;
  active = view;
  state.cell = { series: view.series, cell, thumbnail: view.thumbnail };
  state.hover = null;
  for (const other of views) other.stage.point();
  refreshPanel();
  if (moved) showLegend(active);
  const probability = view.series.probability(view.point, cell);
  const heat = view.heat ? `, ${state.query} ${percent(view.heat.values[cell])}` : "";
  say(`${placeText(view.series, cell)}: ${data.words[view.series.word(view.point, cell)]}`
    + (probability === null ? "" : `, ${percent(probability)}`) + heat);
}

function search(text) {
  byId("search").value = text;
  state.query = text;
  changed();
}

function showHits() {
  const match = active.series.match(state.query);
  byId("ramp").hidden = match === null || active.series.nats === null;
  if (match === null) { byId("hits").textContent = ""; return; }
  const { hits } = active.heat;
  const where = `in ${hits} of ${active.series.cells} cells` + (active.series.k > 1 ? ` among the best ${active.series.k}` : "");
  byId("hits").textContent = (match.whole ? where : `no such word; ${where} as part of one`)
    + (match.tracked ? "; probability known in every cell" : "");
}

function showAgreement() {
  byId("agree")?.remove();
  if (views.length < 2) return;
  const [a, b] = views;
  let same = 0;
  let compared = 0;
  for (const cell of a.visible) {
    const other = mapped({ series: a.series, cell, thumbnail: a.thumbnail }, b);
    if (other === null) continue;
    compared += 1;
    same += Number(a.series.word(a.point, cell) === b.series.word(b.point, other));
  }
  make(byId("views"), "p", { id: "agree", class: "agree", role: "status" }, `Both views read the same word in ${same} of ${compared} cells.`);
}

function move(view, x, y) {
  const from = mapped(state.cell, view);
  if (from === null) return view.visible[0];
  const [x1, y1, x2, y2] = view.series.box(from);
  const near = 0.01 * Math.min(x2 - x1, y2 - y1);
  const target = [x > 0 ? x2 + near : x < 0 ? x1 - near : (x1 + x2) / 2, y > 0 ? y2 + near : y < 0 ? y1 - near : (y1 + y2) / 2];
  return view.series.cellAt(...target, view.thumbnail) ?? from;
}

function rowEnd(view, last) {
  const from = mapped(state.cell, view) ?? view.visible[0];
  const { block, row } = view.series;
  const cells = view.visible.filter((cell) => block[cell] === block[from] && row[cell] === row[from]);
  return last ? cells[cells.length - 1] : cells[0];
}

function resize(by) {
  byId("zoom").value = String(Number(byId("zoom").value) + by);
  zoom();
}

const KEYS = {
  ArrowRight: (view) => [move(view, 1, 0)],
  ArrowLeft: (view) => [move(view, -1, 0)],
  ArrowDown: (view) => [move(view, 0, 1)],
  ArrowUp: (view) => [move(view, 0, -1)],
  Home: (view) => [rowEnd(view, false)],
  End: (view) => [rowEnd(view, true)],
  PageUp: (view, event) => view.step(event.shiftKey ? 0 : 1, 1),
  PageDown: (view, event) => view.step(event.shiftKey ? 0 : 1, -1),
  Enter: (view) => { const cell = mapped(state.cell, view); if (cell !== null) search(data.words[view.series.word(view.point, cell)]); },
  Escape: () => search(""),
  "/": () => byId("search").focus(),
  "+": () => resize(0.5),
  "-": () => resize(-0.5),
};

function pressed(view, event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
  event.preventDefault();
  const next = KEYS[event.key](view, event);
  if (!Array.isArray(next) || next[0] === undefined) return;
  choose(view, next[0]);
  view.stage.reveal(next[0]);
}

function zoom() {
  for (const view of views) view.stage.layout();
  for (const view of views) view.stage.draw();
  const cell = mapped(state.cell, active);
  if (cell !== null) active.stage.reveal(cell);
}

// The second view starts with the other model, or else with the depth at which most cells read otherwise.
function secondView() {
  if (views.length === 2) {
    views.pop().root.remove();
    active = views[0];
  } else {
    const [first] = views;
    const other = SERIES[(SERIES.indexOf(first.series) + 1) % SERIES.length];
    const view = new View("B", other, other === first.series ? farthest(first) : other.start);
    view.mode = Math.min(first.mode, other.plans.length - 1);
    view.build();
    views.push(view);
  }
  byId("views").classList.toggle("two", views.length === 2);
  for (const view of views) view.stage.layout();
  changed();
}

function farthest({ series, point }) {
  const differ = (at) => {
    let count = 0;
    for (let cell = 0; cell < series.cells; cell += 1) count += Number(series.word(at, cell) !== series.word(point, cell));
    return count;
  };
  return series.points.map((_, at) => [differ(at), at]).sort((a, b) => b[0] - a[0] || a[1] - b[1])[0][1];
}

for (const word of data.words.filter((_, at) => meaningful(at)).slice(0, 400)) make(byId("known"), "option", { value: word });
views.push(new View("A", SERIES[0], SERIES[0].start));
[active] = views;
if (data.compressed) { active.mode = 0; active.build(); }
byId("objects-label").hidden = data.objects.length === 0;
byId("search").addEventListener("input", () => { state.query = byId("search").value; changed(); });
byId("search").addEventListener("keydown", (event) => { if (event.key === "Escape") search(""); });
for (const name of ["words", "tint", "objects"]) byId(name).addEventListener("change", changed);
byId("second").addEventListener("change", secondView);
byId("zoom").addEventListener("input", zoom);
byId("controls").addEventListener("submit", (event) => event.preventDefault());
window.addEventListener("resize", zoom);
loadPicture(() => views.forEach((view) => view.stage.draw()));
zoom();
changed();
