// The picture of a view with its cells. Two canvases, no larger than what is seen: cells below, what is pointed at above.
const MARGIN = 0.5;
const SMALLEST = 8;  // font size in pixels below which a word is cut
const picture = new Image();
let greyPicture = null;

// Viridis at nine places, in between linear.
const STOPS = [[68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 145, 140], [40, 174, 128], [94, 201, 98], [173, 220, 48], [253, 231, 37]];
const RAMP = Array.from({ length: 256 }, (_, step) => {
  const at = step / 255 * 8;
  const low = Math.min(Math.floor(at), 7);
  const parts = STOPS[low].map((value, part) => Math.round(value + (at - low) * (STOPS[low + 1][part] - value)));
  return `rgb(${parts.join(" ")} / 0.86)`;
});
const TINTS = data.words.map((_, word) => (data.colours[word] || "#969696") + "7a");
const OUTLINES = ["#ff5d8f", "#ffd54a", "#4ad9ff", "#7dff6b", "#ff9d3b", "#c59bff"];

const ruler = document.createElement("canvas").getContext("2d");
ruler.font = "600 100px system-ui, sans-serif";
const ems = new Map();
function widthOf(word) {
  if (!ems.has(word)) ems.set(word, Math.max(ruler.measureText(word).width / 100, 0.5));
  return ems.get(word);
}

// The largest text that fits into a box, cut where it would be too small to read; null where nothing fits.
function fitted(word, width, height, largest) {
  const size = Math.min(height * 0.44, (width * 0.88) / widthOf(word), largest);
  if (size >= SMALLEST) return [word, Math.floor(size * 2) / 2];
  if (height < SMALLEST * 2 || width < SMALLEST * 3) return null;
  const letters = Array.from(word);
  const room = Math.floor(letters.length * (width * 0.92) / (SMALLEST * widthOf(word))) - 1;
  return room < 2 ? null : [letters.slice(0, room).join("") + "…", SMALLEST];
}

class Stage {
  constructor(view) {
    this.view = view;
    this.box = make(view.root, "div", { class: "stage", tabindex: 0, role: "application", "aria-roledescription": "grid of cells",
      "aria-describedby": "keys" });
    this.layers = make(this.box, "div", { class: "layers" });
    this.low = make(this.layers, "canvas");
    this.high = make(this.layers, "canvas");
    this.spacer = make(this.box, "div", { class: "spacer" });
    this.box.addEventListener("scroll", () => this.draw());
    this.box.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse") hover(view, this.under(event)); });
    this.box.addEventListener("pointerleave", () => hover(view, null));
    this.box.addEventListener("click", (event) => { const cell = this.under(event); if (cell !== null) choose(view, cell); });
    this.box.addEventListener("keydown", (event) => pressed(view, event));
    this.box.addEventListener("focus", () => { if (state.cell === null && view.visible.length) choose(view, view.visible[0]); });
  }

  // Sizes: the whole picture fits into the room at size 1, but cells are at most 84 pixels wide.
  layout() {
    const room = this.view.root.clientWidth || 300;
    const [width, height] = data.size;
    const sides = this.view.visible.map((cell) => { const box = this.view.series.box(cell); return box[2] - box[0]; }).sort((a, b) => a - b);
    this.side = sides[sides.length >> 1] || width;
    const tallest = Math.max(window.innerHeight - 250, 260);
    const fit = Math.min(room / width, tallest / height, 84 / this.side);
    this.scale = fit * Number(byId("zoom").value);
    const whole = [width * this.scale, height * this.scale].map((side) => Math.max(1, Math.round(side)));
    this.spacer.style.width = `${whole[0]}px`;
    this.spacer.style.height = `${whole[1]}px`;
    this.box.style.height = `${Math.min(whole[1], Math.max(tallest, 1))}px`;
    const seen = [Math.min(whole[0], room), Math.min(whole[1], tallest)].map(Math.ceil);
    this.ratio = Math.min(window.devicePixelRatio || 1, 2);
    for (const canvas of [this.low, this.high]) {
      canvas.width = Math.ceil(seen[0] * this.ratio);
      canvas.height = Math.ceil(seen[1] * this.ratio);
      canvas.style.width = `${seen[0]}px`;
      canvas.style.height = `${seen[1]}px`;
    }
    this.seen = seen;
  }

  under(event) {
    const frame = this.spacer.getBoundingClientRect();
    return this.view.series.cellAt((event.clientX - frame.left) / this.scale, (event.clientY - frame.top) / this.scale, this.view.thumbnail);
  }

  // Left, top, width and height of a rectangle of the picture on the canvas.
  placed([x1, y1, x2, y2]) {
    const s = this.scale;
    return [x1 * s - this.box.scrollLeft, y1 * s - this.box.scrollTop, (x2 - x1) * s, (y2 - y1) * s];
  }

  inSight([left, top, width, height]) {
    return left + width > 0 && top + height > 0 && left < this.seen[0] && top < this.seen[1];
  }

  begin(canvas) {
    const context = canvas.getContext("2d");
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.clearRect(0, 0, this.seen[0], this.seen[1]);
    return context;
  }

  draw() {
    const { view } = this;
    const context = this.begin(this.low);
    const tint = byId("tint").checked;
    const frame = this.placed([0, 0, ...data.size]);
    context.fillStyle = "#787878";
    context.fillRect(...frame);
    if (greyPicture) context.drawImage(tint || state.query ? greyPicture : picture, ...frame);
    this.veil(context, frame);
    const key = `${state.query}/${SERIES.indexOf(view.series)}/${view.point}`;
    if (this.heated !== key) {
      const match = view.series.match(state.query);
      view.heat = match ? view.series.heat(view.point, match) : null;
      this.heated = key;
    }
    const cells = view.visible.map((cell) => [cell, this.placed(view.series.box(cell))]).filter(([, place]) => this.inSight(place));
    for (const [cell, place] of cells) this.fill(context, cell, place, tint);
    const texts = view.plan ? this.outlineRuns(context, cells) : cells;
    if (view.plan) for (const item of cells) if (!this.kept(item[0])) texts.push(item);
    if (byId("objects").checked) this.outlineObjects(context);
    if (byId("words").checked) this.write(context, texts);
    if (byId("objects").checked) this.nameObjects(context);
    this.drawTiles(context);
    this.point();
  }

  kept(cell) {
    const { plan, point, series } = this.view;
    return !plan || Boolean(plan.flags[point * series.cells + cell] & KEPT);
  }

  // Dark over what no cell looks at.
  veil(context, frame) {
    context.fillStyle = "rgb(17 20 26 / 0.75)";
    context.beginPath();
    context.rect(...frame);
    for (const box of this.blockBoxes()) context.rect(...this.placed(box));
    context.fill("evenodd");
  }

  blockBoxes() {
    const boxes = new Map();
    for (const cell of this.view.visible) {
      const [x1, y1, x2, y2] = this.view.series.box(cell);
      const [a, b, c, d] = boxes.get(this.view.series.block[cell]) || [x1, y1, x2, y2];
      boxes.set(this.view.series.block[cell], [Math.min(a, x1), Math.min(b, y1), Math.max(c, x2), Math.max(d, y2)]);
    }
    return [...boxes.values()];
  }

  fill(context, cell, [left, top, width, height], tint) {
    const { view } = this;
    if (view.heat) context.fillStyle = RAMP[Math.round(255 * view.heat.values[cell])];
    else if (!this.kept(cell)) context.fillStyle = "rgb(17 20 26 / 0.76)";
    else if (tint) context.fillStyle = TINTS[view.series.word(view.point, cell)];
    else context.fillStyle = "rgb(255 255 255 / 0.05)";
    context.fillRect(left + MARGIN, top + MARGIN, Math.max(width - 2 * MARGIN, 0.5), Math.max(height - 2 * MARGIN, 0.5));
  }

  // Outlines of the kept runs, one rectangle per row; returns where their words go: into the longest part.
  outlineRuns(context, cells) {
    const { plan, point, series } = this.view;
    const parts = [];
    let before = null;
    for (const [cell, place] of cells) {
      if (!this.kept(cell)) { before = null; continue; }
      const starts = plan.flags[point * series.cells + cell] & STARTS;
      const goesOn = before && !starts && before.last === cell - 1 && series.row[cell] === series.row[cell - 1];
      if (goesOn) {
        before.last = cell;
        before.place[2] = place[0] + place[2] - before.place[0];
      } else {
        before = { first: cell, last: cell, place: [...place], run: starts || !before || before.last !== cell - 1 ? cell : before.run };
        parts.push(before);
      }
    }
    const longest = new Map();
    context.strokeStyle = "rgb(255 255 255 / 0.9)";
    context.lineWidth = Math.max(1, Math.min(2, this.side * this.scale / 24));
    for (const part of parts) {
      const [left, top, width, height] = part.place;
      context.strokeRect(left + 1.5, top + 1.5, Math.max(width - 3, 0.5), Math.max(height - 3, 0.5));
      if (!longest.has(part.run) || longest.get(part.run).place[2] < width) longest.set(part.run, part);
    }
    return [...longest.values()].map((part) => [part.first, part.place]);
  }

  write(context, texts) {
    const largest = this.side * this.scale * 0.42;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineJoin = "round";
    context.direction = "ltr";
    for (const [cell, [left, top, width, height]] of texts) {
      const text = fitted(data.words[this.view.series.word(this.view.point, cell)], width, height, largest);
      if (!text) continue;
      context.font = `600 ${text[1]}px system-ui, sans-serif`;
      context.lineWidth = text[1] / 5;
      context.strokeStyle = "#11141a";
      context.fillStyle = this.kept(cell) ? "#ffffff" : "#9aa0aa";
      context.strokeText(text[0], left + width / 2, top + height / 2);
      context.fillText(text[0], left + width / 2, top + height / 2);
    }
  }

  outlineObjects(context) {
    data.objects.forEach((object, number) => {
      const colour = OUTLINES[number % OUTLINES.length];
      const place = this.placed(object.box);
      if (object.mask) {
        const { inside, edge } = maskPictures(object, colour);
        const whole = this.placed([0, 0, ...data.size]);
        if (!this.view.heat) context.drawImage(inside, ...whole);  // or it would look like a probability
        context.drawImage(edge, ...whole);
      }
      context.lineWidth = 2.5;
      context.strokeStyle = colour;
      context.setLineDash([7, 4]);
      context.strokeRect(...place);
      context.setLineDash([]);
    });
  }

  nameObjects(context) {
    context.font = "600 12px system-ui, sans-serif";
    context.textAlign = "left";
    context.textBaseline = "middle";
    data.objects.forEach((object, number) => {
      const place = this.placed(object.box);
      const width = context.measureText(object.name).width + 8;
      const top = Math.max(place[1] - 16, 0);
      context.fillStyle = OUTLINES[number % OUTLINES.length];
      context.fillRect(place[0], top, width, 16);
      context.fillStyle = "#11141a";
      context.fillText(object.name, place[0] + 4, top + 8.5);
    });
  }

  drawTiles(context) {
    const boxes = this.blockBoxes();
    if (boxes.length < 2) return;
    context.strokeStyle = "#ffffff";
    context.lineWidth = 3;
    for (const box of boxes) context.strokeRect(...this.placed(box));
  }

  // What is pointed at and what is chosen, on the upper canvas.
  point() {
    const context = this.begin(this.high);
    const { view } = this;
    const chosen = mapped(state.cell, view);
    const pointed = mapped(state.hover, view);
    const shown = pointed ?? chosen;
    if (shown !== null && view.plan) {
      const run = view.series.run(view.plan, view.point, shown);
      context.strokeStyle = "#ffffff";
      context.setLineDash([4, 3]);
      context.lineWidth = 2;
      for (let cell = run.first; cell < run.first + run.length; cell += 1) context.strokeRect(...this.placed(view.series.box(cell)));
      context.setLineDash([]);
    }
    if (chosen !== null) this.frame(context, chosen, "#ffd54a", 3);
    if (pointed !== null && pointed !== chosen) this.frame(context, pointed, "#ffffff", 2);
  }

  frame(context, cell, colour, width) {
    const [left, top, wide, high] = this.placed(this.view.series.box(cell));
    context.lineWidth = width + 2;
    context.strokeStyle = "#11141a";
    context.strokeRect(left, top, wide, high);
    context.lineWidth = width;
    context.strokeStyle = colour;
    context.strokeRect(left, top, wide, high);
  }

  reveal(cell) {
    const [left, top, width, height] = this.placed(this.view.series.box(cell));
    const by = (start, length, room) => (start < 0 ? start : Math.max(0, start + length - room));
    this.box.scrollBy(by(left, width, this.box.clientWidth), by(top, height, this.box.clientHeight));
  }
}

// A mask as two pictures: its inside, and its pixels that touch what is outside.
const maskPictureOf = new Map();
function maskPictures(object, colour) {
  if (maskPictureOf.has(object)) return maskPictureOf.get(object);
  const [height, width] = object.mask.size;
  const set = new Uint8Array(width * height);
  let at = 0;
  object.mask.runs.forEach((length, number) => { set.fill(number % 2, at, at + length); at += length; });
  const draw = (shade, wanted) => {
    const canvas = make(null, "canvas", { width, height });
    const context = canvas.getContext("2d");
    context.fillStyle = colour + shade;
    set.forEach((inside, pixel) => { if (inside && wanted(pixel)) context.fillRect(pixel % width, Math.floor(pixel / width), 1, 1); });
    return canvas;
  };
  const touches = (pixel) => pixel % width === 0 || pixel % width === width - 1
    || !set[pixel - 1] || !set[pixel + 1] || !set[pixel - width] || !set[pixel + width];
  const pictures = { inside: draw("50", () => true), edge: draw("ff", touches) };
  maskPictureOf.set(object, pictures);
  return pictures;
}

// Words' colours must look as in the legend, so most of the picture's own colour is taken away.
function loadPicture(done) {
  if (!data.picture) return;
  picture.onload = () => {
    greyPicture = make(null, "canvas", { width: picture.naturalWidth, height: picture.naturalHeight });
    const context = greyPicture.getContext("2d");
    context.drawImage(picture, 0, 0);
    context.globalCompositeOperation = "saturation";
    context.fillStyle = "hsl(0 0% 50% / 0.65)";
    context.fillRect(0, 0, picture.naturalWidth, picture.naturalHeight);
    done();
  };
  picture.src = data.picture;
}
