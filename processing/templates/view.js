// One view: which model, at which depths, through which lens, and its picture.
const byId = (id) => document.getElementById(id);

function make(parent, name, attributes = {}, text) {
  const element = name.startsWith("svg:") ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

const AXES = [["vision tower", 0], ["language model", 1]];
function depthText(series, axis, value) {
  if (value === null) return axis === 1 ? "connector" : "-";
  const last = Math.max(...series.values(axis).map(Number));
  return `${value} of ${last}` + (axis === 0 && value === series.native ? " (its own)" : "");
}
function pointText(series, point) {
  const [vision, llm, lens] = series.points[point];
  const parts = [series.name];
  if (vision !== null) parts.push(`vision depth ${vision}`);
  if (vision !== null || llm !== null) parts.push(llm === null ? "connector" : `language model depth ${llm}`);
  if (lens) parts.push(lens);
  return parts.filter(Boolean).join(", ");
}

class View {
  constructor(letter, series, point) {
    this.letter = letter;
    this.root = make(byId("views"), "section", { class: "view", "aria-label": `View ${letter}` });
    this.bar = make(this.root, "div", { class: "bar" });
    this.mode = -1;  // number of the compression that is shown, -1: all words
    this.thumbnail = false;
    this.series = series;
    this.point = point;
    this.stage = new Stage(this);
    this.build();
  }

  build() {
    this.bar.replaceChildren();
    this.sliders = [];
    const { series } = this;
    if (SERIES.length > 1) {
      this.choice("model", SERIES.map((item) => item.name), SERIES.indexOf(series), (number) => {
        this.series = SERIES[number];
        this.point = this.series.start;
        this.mode = Math.min(this.mode, this.series.plans.length - 1);
        this.build();
        changed();
      });
    }
    for (const [name, axis] of AXES) {
      const values = series.values(axis);
      if (values.length < 2) continue;
      const label = make(this.bar, "label");
      make(label, "span", {}, name);
      const input = make(label, "input", { type: "range", min: 0, max: values.length - 1, step: 1, class: `axis${axis}` });
      const output = make(label, "output");
      input.addEventListener("input", () => this.go(series.nearest(this.point, axis, values[Number(input.value)])));
      this.sliders.push({ axis, values, input, output });
    }
    const lenses = series.values(2);
    this.lens = lenses.length > 1
      ? this.choice("lens", lenses, 0, (number) => this.go(series.nearest(this.point, 2, lenses[number]))) : null;
    if (series.plans.length) {
      const names = ["every word", ...series.plans.map((plan) => `what ${plan.name} keeps`)];
      this.choice("show", names, this.mode + 1, (number) => { this.mode = number - 1; changed(); });
    }
    if (series.thumbnails.includes(true) && series.thumbnails.includes(false)) {
      this.choice("part", ["tiles", "thumbnail"], Number(this.thumbnail), (number) => {
        this.thumbnail = number === 1;
        this.stage.layout();
        changed();
      });
    }
    this.thumbnail = series.thumbnails.includes(false) ? this.thumbnail && series.thumbnails.includes(true) : true;
    this.shown = { tiles: series.visible(false), thumbnail: series.visible(true) };
    this.sync();
    this.stage.layout();
  }

  choice(name, options, chosen, act) {
    const label = make(this.bar, "label");
    make(label, "span", {}, name);
    const select = make(label, "select");
    options.forEach((option, number) => make(select, "option", { value: number }, option));
    select.value = String(chosen);
    make(this.bar, "span");
    select.addEventListener("change", () => act(Number(select.value)));
    return select;
  }

  get visible() { return this.thumbnail ? this.shown.thumbnail : this.shown.tiles; }
  get plan() { return this.mode < 0 ? null : this.series.plans[this.mode]; }

  go(point) {
    this.point = point;
    this.sync();
    changed();
  }

  step(axis, by) {
    const slider = this.sliders.find((item) => item.axis === axis);
    if (!slider) return;
    const at = Math.min(Math.max(Number(slider.input.value) + by, 0), slider.values.length - 1);
    this.go(this.series.nearest(this.point, axis, slider.values[at]));
    say(pointText(this.series, this.point));
  }

  sync() {
    for (const { axis, values, input, output } of this.sliders) {
      const value = this.series.points[this.point][axis];
      input.value = String(values.indexOf(value));
      output.textContent = depthText(this.series, axis, value);
      input.setAttribute("aria-valuetext", output.textContent);
    }
    if (this.lens) this.lens.value = String(this.series.values(2).indexOf(this.series.points[this.point][2]));
    this.stage.box.setAttribute("aria-label", `Cells of view ${this.letter}: ${pointText(this.series, this.point)}`);
  }
}
