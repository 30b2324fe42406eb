"use strict";
// Draws the curves of the page into its figures: by step, tokens or hours, linear or logarithmic, with zoom (drag, or
// the keys + and -), and the values under the pointer (or under a cursor that the arrow keys move).
const { charts, axes } = JSON.parse(document.getElementById("curves").textContent);
const HEIGHT = 210, LEFT = 54, RIGHT = 8, TOP = 6, BOTTOM = 34;
const CLOSEST = 1e-5; // of the whole, which is as closely as anything lies
const LABELS = { steps: "step", tokens: "tokens", hours: "hours of steps" };
const drawn = [];
let by = "steps";

function short(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e15)) return value.toExponential(1).replace(".0e", "e");
  const options = size >= 1e4 ? { notation: "compact", maximumSignificantDigits: 4 } : { maximumSignificantDigits: 4 };
  return value.toLocaleString("en", options);
}

// Where the values of one axis lie on another, by linear interpolation between the steps that are known.
function along(axis, step) {
  const to = axis[by], from = axis.steps;
  if (by === "steps" || !to.length) return by === "steps" ? step : null;
  let low = 0, high = from.length - 1;
  if (step >= from[high]) return to[high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (from[middle] <= step) low = middle; else high = middle;
  }
  return to[low] + (to[high] - to[low]) * (step - from[low]) / (from[high] - from[low]);
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= rough);
  const found = [];
  const first = Math.ceil(low / step);
  for (let n = 0; n <= 2 * count && (first + n) * step <= high + step * 1e-9; n++) found.push((first + n) * step);
  return found;
}

// Labels of ticks, with as many digits as tell one from the next.
function labelled(values) {
  const labels = values.map(short);
  return new Set(labels).size === labels.length ? labels : values.map(value => String(Number(value.toPrecision(9))));
}

// Round values on a logarithmic axis; where it is so short that hardly one lies on it, those of a linear one.
function powers(low, high) {
  const found = [], decades = Math.log10(high / low), every = Math.ceil(decades / 6);
  for (let n = Math.floor(Math.log10(low)); 10 ** n <= high; n++)
    for (const m of decades > 3 ? [1] : decades > 1 ? [1, 3] : [1, 1.5, 2, 3, 5, 7])
      if (m * 10 ** n >= low && m * 10 ** n <= high && n % every === 0) found.push(m * 10 ** n);
  return found.length > 1 ? found : ticks(low, high, 5);
}

class Plot {
  constructor(figure) {
    this.chart = charts[figure.dataset.chart];
    this.figure = figure;
    this.log = this.chart.log;
    this.zoom = this.at = this.drag = null;
    this.positive = this.chart.series.every(one => one.y.every(value => value > 0));
    this.output = figure.querySelector("output");
    this.buttons();
    this.svg = this.make("svg", { height: HEIGHT, "aria-hidden": "true" }, figure.querySelector(".plot"));
    this.place();
    figure.addEventListener("keydown", event => this.key(event));
    this.svg.addEventListener("pointerdown", event => this.down(event));
    this.svg.addEventListener("pointermove", event => this.move(event));
    this.svg.addEventListener("pointerup", event => this.up(event));
    this.svg.addEventListener("pointercancel", () => { this.drag = null; this.cursor(null); });
    this.svg.addEventListener("pointerleave", () => { if (!this.drag) this.cursor(null); });
    this.svg.addEventListener("dblclick", () => this.show(null));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  make(name, attributes, parent = this.svg) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    return parent.appendChild(made);
  }

  buttons() {
    const caption = this.figure.querySelector("figcaption");
    const add = (label, act) => {
      const button = caption.appendChild(document.createElement("button"));
      button.type = "button";
      button.textContent = label;
      button.addEventListener("click", () => act(button));
      return button;
    };
    if (this.positive) {
      const button = add("log", () => {
        this.log = !this.log;
        button.setAttribute("aria-pressed", this.log);
        this.draw();
      });
      button.setAttribute("aria-pressed", this.log);
    }
    this.reset = add("whole", () => this.show(null));
    this.reset.hidden = true;
  }

  // The curves by the axis that is chosen; one that has no such axis, as no tokens were counted, is not drawn.
  place() {
    this.curves = this.chart.series.map(one => {
      const to = steps => steps && steps.map(step => along(axes[one.axis], step));
      return { ...one, x: to(one.x), sx: to(one.sx) };
    }).map(one => one.x.includes(null) ? { ...one, x: [], y: [], sx: null } : one);
    const all = this.curves.flatMap(one => one.x.length ? [one.x[0], one.x[one.x.length - 1]] : []);
    const low = Math.min(...all), high = Math.max(...all);
    this.whole = all.length ? [low, high > low ? high : low + 1] : null;
    this.zoom = null;
  }

  // From the least to the largest value that can be seen, so that a zoom shows what was flat before; of all where it is
  // between two points.
  span([from, to] = this.zoom || this.whole) {
    let low = Infinity, high = -Infinity;
    const see = (xs, ys) => xs && ys && xs.forEach((x, i) => {
      if (x < from || x > to) return;
      low = Math.min(low, ys[i]);
      high = Math.max(high, ys[i]);
    });
    for (const one of this.curves) {
      for (const ys of this.log ? [one.y] : [one.y, one.low, one.high]) see(one.x, ys);
      see(one.sx, one.sy);
    }
    if (low > high) return this.span(this.whole);
    if (this.log) return low < high ? [low, high] : [low / 2, high * 2];
    const room = (high - low) * 0.04 || Math.abs(low) * 0.1 || 0.5;
    return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
  }

  draw() {
    const width = this.svg.clientWidth;
    if (!width) return;
    this.svg.replaceChildren();
    if (!this.whole) {
      this.make("text", { x: LEFT, y: HEIGHT / 2 }).textContent = `not on record by ${LABELS[by]}`;
      return;
    }
    const [x0, x1] = this.zoom || this.whole, [y0, y1] = this.span();
    const scaled = this.log ? Math.log : value => value;
    this.width = width - LEFT - RIGHT;
    this.px = x => LEFT + (x - x0) / (x1 - x0) * this.width;
    this.py = y => TOP + (1 - (scaled(y) - scaled(y0)) / (scaled(y1) - scaled(y0))) * (HEIGHT - TOP - BOTTOM);
    const ys = this.log ? powers(y0, y1) : ticks(y0, y1, 5), xs = ticks(x0, x1, width > 500 ? 9 : 5);
    const [ylabels, xlabels] = [labelled(ys), labelled(xs)];
    ys.forEach((y, i) => {
      this.make("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: this.py(y), y2: this.py(y) });
      this.make("text", { x: LEFT - 6, y: this.py(y) + 4, "text-anchor": "end" }).textContent = ylabels[i];
    });
    xs.forEach((x, i) => {
      this.make("line", { class: "grid", x1: this.px(x), x2: this.px(x), y1: TOP, y2: HEIGHT - BOTTOM });
      this.make("text", { x: this.px(x), y: HEIGHT - BOTTOM + 14, "text-anchor": "middle" }).textContent = xlabels[i];
    });
    this.make("text", { x: LEFT + this.width / 2, y: HEIGHT - 3, "text-anchor": "middle" }).textContent = LABELS[by];
    const id = `clip${this.figure.dataset.chart}`;
    const clip = this.make("clipPath", { id });
    this.make("rect", { x: LEFT, y: TOP - 2, width: this.width, height: HEIGHT - TOP - BOTTOM + 4 }, clip);
    const inside = this.make("g", { "clip-path": `url(#${id})` });
    this.curves.forEach((one, i) => this.curve(one, i, inside));
    this.marks = this.make("g", {});
    this.cursor(this.at);
  }

  curve(one, i, parent) {
    const group = this.make("g", { class: `c${i % 8}` }, parent);
    const line = (xs, ys) => xs.map((x, n) => `${n ? "L" : "M"}${this.px(x).toFixed(1)} ${this.py(ys[n]).toFixed(1)}`).join("");
    if (one.low && !this.log) {
      const back = line([...one.x].reverse(), [...one.high].reverse());
      this.make("path", { class: "band", d: `${line(one.x, one.low)}L${back.slice(1)}Z` }, group);
    }
    const dash = i >= 8 ? { "stroke-dasharray": "5 3" } : {};
    this.make("path", { class: one.sx ? "curve raw" : "curve", d: line(one.x, one.y), ...dash }, group);
    if (one.sx) this.make("path", { class: "curve", d: line(one.sx, one.sy), ...dash }, group);
    if (one.x.length < 12)
      one.x.forEach((x, n) => this.make("circle", { class: "dot", cx: this.px(x), cy: this.py(one.y[n]), r: 2.5 }, group));
  }

  // Shows the values of every curve nearest to x.
  cursor(x) {
    this.at = x;
    if (!this.marks) return;
    this.marks.replaceChildren();
    if (x === null) {
      this.output.textContent = "";
      return;
    }
    this.make("line", { class: "cursor", x1: this.px(x), x2: this.px(x), y1: TOP, y2: HEIGHT - BOTTOM }, this.marks);
    const said = this.curves.flatMap((one, i) => {
      if (!one.x.length) return [];
      const nearest = xs => xs.reduce((best, at, n) => Math.abs(at - x) < Math.abs(xs[best] - x) ? n : best, 0);
      const raw = nearest(one.x), smooth = one.sx && nearest(one.sx);
      const y = one.sx ? one.sy[smooth] : one.y[raw];
      const dot = { class: "dot", cx: this.px(one.sx ? one.sx[smooth] : one.x[raw]), cy: this.py(y), r: 3.5 };
      this.make("circle", dot, this.make("g", { class: `c${i % 8}` }, this.marks));
      const name = this.curves.length > 1 ? `${one.name} ` : "";
      const interval = one.low ? ` (${short(one.low[raw])} to ${short(one.high[raw])})` : "";
      return [`${name}${short(one.y[raw])}${interval}${one.sx ? `, smoothed ${short(y)}` : ""}`];
    });
    this.output.textContent = `${LABELS[by]} ${short(x)}: ${said.join("; ")}`;
  }

  show(zoom) {
    if (!this.whole) return this.draw();
    const [low, high] = this.whole;
    if (zoom && zoom[1] - zoom[0] < (high - low) * CLOSEST) return;
    this.zoom = zoom && [Math.max(low, zoom[0]), Math.min(high, zoom[1])];
    if (this.zoom && this.zoom[1] - this.zoom[0] >= high - low) this.zoom = null;
    this.reset.hidden = !this.zoom;
    this.draw();
  }

  under(event) {
    const [x0, x1] = this.zoom || this.whole;
    const share = (event.clientX - this.svg.getBoundingClientRect().left - LEFT) / this.width;
    return x0 + Math.min(1, Math.max(0, share)) * (x1 - x0);
  }

  down(event) {
    if (!this.whole) return;
    this.drag = { from: this.under(event), left: event.clientX };
    this.svg.setPointerCapture(event.pointerId);
  }

  move(event) {
    if (!this.whole) return;
    const x = this.under(event);
    this.cursor(x);
    if (this.drag && Math.abs(event.clientX - this.drag.left) > 6) {
      const [a, b] = [this.px(this.drag.from), this.px(x)];
      const size = { x: Math.min(a, b), y: TOP, width: Math.abs(b - a), height: HEIGHT - TOP - BOTTOM };
      this.make("rect", { class: "zoom", ...size }, this.marks);
    }
  }

  up(event) {
    const drag = this.drag;
    this.drag = null;
    if (drag && Math.abs(event.clientX - drag.left) > 6)
      this.show([drag.from, this.under(event)].sort((a, b) => a - b));
  }

  key(event) {
    if (!this.whole || event.target !== this.figure || event.ctrlKey || event.metaKey || event.altKey) return;
    const [low, high] = this.zoom || this.whole, size = high - low;
    const x = this.at === null ? (low + high) / 2 : this.at;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const to = this.at === null ? x : x + (event.key === "ArrowLeft" ? -1 : 1) * size / 60;
      this.cursor(Math.min(high, Math.max(low, to)));
    } else if (event.key === "+" || event.key === "=") this.show([x - size / 4, x + size / 4]);
    else if (event.key === "-") this.show([x - size, x + size]);
    else if (event.key === "Escape" || event.key === "0") this.show(null);
    else if (event.key === "l" && this.positive) this.figure.querySelector("button").click();
    else return;
    event.preventDefault();
  }
}

// The switch between the axes stands above the first curves, and is of all.
function controls(first) {
  const form = document.createElement("form");
  form.className = "controls";
  const label = form.appendChild(document.createElement("span"));
  label.textContent = "Curves by";
  for (const name of Object.keys(LABELS)) {
    const choice = form.appendChild(document.createElement("label")), input = document.createElement("input");
    Object.assign(input, { type: "radio", name: "by", value: name, checked: name === by });
    choice.append(input, ` ${LABELS[name]}`);
  }
  const help = form.appendChild(document.createElement("span"));
  help.textContent = "Drag to zoom, double click for the whole. Keys on a chart: ← → values, + − zoom, 0 whole, l log.";
  form.addEventListener("change", () => {
    by = new FormData(form).get("by");
    for (const plot of drawn) {
      plot.at = null;
      plot.place();
      plot.show(null);
    }
  });
  first.before(form);
}

const figures = document.querySelectorAll("figure.chart");
for (const figure of figures) drawn.push(new Plot(figure));
if (figures.length) controls(figures[0].closest("details, .charts"));
