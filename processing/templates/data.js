"use strict";
// The readings of the page, decoded into typed arrays; the layout is that of page_data.py.
const data = JSON.parse(document.getElementById("data").textContent);
const PROBABILITY = Float32Array.from({ length: 65536 }, (_, step) => step === 65535 ? 0 : Math.exp(-step / 4096));
const STARTS = 1, KEPT = 2, ANCHOR = 4;
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const meaningful = (word) => data.meaning[word] === "1";

class Series {
  constructor(raw) {
    Object.assign(this, { name: raw.name, points: raw.points, start: raw.start, native: raw.native, k: raw.k });
    this.grids = raw.grids;
    this.thumbnails = raw.thumbnails;
    this.boxes = new Float32Array(bytes(raw.boxes).buffer);
    this.cells = this.boxes.length / 4;
    this.ids = raw.ids;
    this.wordOf = raw.word_of;
    this.blank = raw.blank;
    const top = bytes(raw.top).buffer;
    this.top = raw.wide ? new Uint32Array(top) : new Uint16Array(top);
    this.nats = raw.nats === null ? null : new Uint16Array(bytes(raw.nats).buffer);
    this.plans = raw.plans.map((plan) => ({ name: plan.name, flags: bytes(plan.flags) }));
    this.tracked = new Map(Object.entries(raw.tracked).map(([word, values]) => [word.toLowerCase(), new Uint16Array(bytes(values).buffer)]));
    this.block = new Uint16Array(this.cells);
    this.row = new Uint16Array(this.cells);
    this.column = new Uint16Array(this.cells);
    let cell = 0;
    this.grids.forEach(([rows, columns], block) => {
      for (let at = 0; at < rows * columns; at += 1, cell += 1) {
        this.block[cell] = block;
        this.row[cell] = Math.floor(at / columns);
        this.column[cell] = at % columns;
      }
    });
  }

  entry(point, cell, rank = 0) { return this.top[(point * this.cells + cell) * this.k + rank]; }
  word(point, cell, rank = 0) { return this.wordOf[this.entry(point, cell, rank)]; }
  probability(point, cell, rank = 0) {
    return this.nats === null ? null : PROBABILITY[this.nats[(point * this.cells + cell) * this.k + rank]];
  }
  box(cell) { return this.boxes.subarray(4 * cell, 4 * cell + 4); }

  // Cells with an area, of the tiles or of the thumbnail.
  visible(thumbnail) {
    const found = [];
    for (let cell = 0; cell < this.cells; cell += 1) {
      const [x1, y1, x2, y2] = this.box(cell);
      if (this.thumbnails[this.block[cell]] === thumbnail && x2 > x1 && y2 > y1) found.push(cell);
    }
    return found;
  }

  cellAt(x, y, thumbnail) {
    for (let cell = 0; cell < this.cells; cell += 1) {
      const at = 4 * cell;
      if (x >= this.boxes[at] && y >= this.boxes[at + 1] && x < this.boxes[at + 2] && y < this.boxes[at + 3]
        && this.thumbnails[this.block[cell]] === thumbnail) return cell;
    }
    return null;
  }

  // The point with one coordinate as asked for (0: vision, 1: language model, 2: lens) that is nearest in the others.
  nearest(point, axis, value) {
    const wanted = [...this.points[point]];
    wanted[axis] = value;
    const number = (depth) => (depth === null ? -1 : depth);
    const far = (other) => (other[axis] === value ? 0 : 1e6) + (other[2] === wanted[2] ? 0 : 300)
      + 2 * Math.abs(number(other[0]) - number(wanted[0])) + Math.abs(number(other[1]) - number(wanted[1]));
    return this.points.map((other, at) => [far(other), at]).sort((a, b) => a[0] - b[0] || a[1] - b[1])[0][1];
  }

  // Points that differ from one along an axis alone, by depth. The plain connector begins every path through the
  // language model, whatever the lens.
  along(point, axis) {
    const here = this.points[point];
    const number = (depth) => (depth === null ? -1 : depth);
    const inside = this.points.find((other) => other[1] !== null && other[0] === here[0]);
    const lens = axis === 1 && here[1] === null && inside ? inside[2] : here[2];
    return this.points.map((_, at) => at).filter((at) => {
      const other = this.points[at];
      const same = other[2] === lens || (axis === 1 && other[1] === null && other[2] === "");
      return other[1 - axis] === here[1 - axis] && same;
    }).sort((a, b) => number(this.points[a][axis]) - number(this.points[b][axis]));
  }

  // The values that an axis takes, ascending, the connector before the language model.
  values(axis) {
    const found = [...new Set(this.points.map((point) => point[axis]))];
    if (axis === 2) return found.filter((lens) => lens !== "" || found.length === 1);
    return found.sort((a, b) => (a === null ? -1 : a) - (b === null ? -1 : b));
  }

  // Entries that a search means: the word itself, whatever its case and blank; else words that contain it.
  match(query) {
    const wanted = query.trim().toLowerCase();
    if (wanted === "") return null;
    const words = data.words.map((word) => word.toLowerCase());
    const whole = words.includes(wanted) || SERIES.some((series) => series.tracked.has(wanted));
    const entries = Uint8Array.from(this.wordOf, (word) => Number(whole ? words[word] === wanted : words[word].includes(wanted)));
    return { wanted, whole, entries, tracked: this.tracked.get(wanted) || null };
  }

  // The probability of what was searched for in every cell at a point, and how many cells hold it among their readings.
  heat(point, match) {
    const values = new Float32Array(this.cells);
    let hits = 0;
    for (let cell = 0; cell < this.cells; cell += 1) {
      let sum = 0;
      let found = false;
      for (let rank = 0; rank < this.k; rank += 1) {
        if (!match.entries[this.entry(point, cell, rank)]) continue;
        found = true;
        sum += this.nats === null ? (rank === 0 ? 1 : 0) : this.probability(point, cell, rank);
      }
      hits += Number(found);
      values[cell] = match.tracked ? PROBABILITY[match.tracked[point * this.cells + cell]] : Math.min(sum, 1);
    }
    return { values, hits };
  }

  // First cell and length of the run of a cell under a plan.
  run(plan, point, cell) {
    const at = point * this.cells;
    let first = cell;
    while (first > 0 && !(plan.flags[at + first] & STARTS)) first -= 1;
    let end = cell + 1;
    while (end < this.cells && !(plan.flags[at + end] & STARTS)) end += 1;
    return { first, length: end - first, kept: Boolean(plan.flags[at + cell] & KEPT) };
  }

  // Tokens that a plan leaves at a point.
  left(plan, point) {
    let count = 0;
    for (let cell = 0; cell < this.cells; cell += 1) count += Number(Boolean(plan.flags[point * this.cells + cell] & ANCHOR));
    return count;
  }
}

const SERIES = data.series.map((raw) => new Series(raw));
