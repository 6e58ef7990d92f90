// Plot of a measure over the steps: one line per entity, one dash style per run, a cursor at the step, and a value table.

const SVG_NAMESPACE = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "line", "rect", "text", "circle", "g"]);
const DASHES = ["", "7 4", "2 3", "10 3 2 3", "5 2 1 2 1 2"];

/** Create an element; strings become text nodes, never markup. */
function h(tag, attributes = {}, ...children) {
  const node = SVG_TAGS.has(tag) ? document.createElementNS(SVG_NAMESPACE, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Share of the run at which a step lies, 0 to 1. */
function shareOf(run, position) {
  return run.calls > 1 ? run.steps[position] / (run.calls - 1) : 0;
}

function nearest(run, share) {
  let best = 0;
  run.steps.forEach((_, i) => {
    if (Math.abs(shareOf(run, i) - share) < Math.abs(shareOf(run, best) - share)) best = i;
  });
  return best;
}

class Plot {
  constructor(meta, { onstep, onmeasure }) {
    this.meta = meta;
    this.reference = meta.runs[meta.reference];
    this.onstep = onstep;
    const measures = meta.choices.measure;
    this.select = h(
      "select",
      { "aria-label": "Measure", onchange: () => onmeasure(measures[this.select.selectedIndex]) },
      ...measures.map((measure) => h("option", {}, measure.replaceAll("_", " "))),
    );
    this.meaning = h("p", { class: "elx-soft" });
    this.holder = h("div", { class: "elx-plot" });
    this.table = h("div", { class: "elx-values", tabindex: "0", role: "group", "aria-label": "Values at this step" });
    this.element = h("section", { class: "elx-measures", "aria-label": "Measures over the steps" });
    if (measures.length) {
      this.element.append(h("div", { class: "elx-heading" }, h("h3", {}, "Over the steps"), this.select));
      this.element.append(this.meaning, this.holder, this.table);
    } else {
      this.element.append(h("h3", {}, "Over the steps"), h("p", { class: "elx-soft" }, "No measures are available."));
    }
    const seek = (event) => this.seek(event);
    this.holder.addEventListener("pointerdown", (event) => {
      this.holder.setPointerCapture(event.pointerId);
      seek(event);
    });
    this.holder.addEventListener("pointermove", (event) => event.buttons && seek(event));
  }

  /** Lines of the measure in all runs, as [{name, color, runs: [values or undefined]}]. */
  lines(measure) {
    const rows = new Map();
    this.meta.runs.forEach((run, r) => {
      for (const line of run.measures[measure] ?? []) {
        const key = `${line.name} ${line.color}`;
        if (!rows.has(key)) rows.set(key, { ...line, runs: [] });
        rows.get(key).runs[r] = line.values;
      }
    });
    return [...rows.values()];
  }

  update(measure, positions) {
    if (!this.meta.choices.measure.length) return;
    const width = Math.max(240, Math.round(this.holder.clientWidth || 320));
    if (this.shown !== `${measure} ${width}`) {
      this.shown = `${measure} ${width}`;
      this.select.selectedIndex = this.meta.choices.measure.indexOf(measure);
      say(this.meaning, this.meta.meanings[measure] ?? "");
      this.build(measure, width);
    }
    const at = this.x(shareOf(this.reference, positions[this.meta.reference]));
    this.cursor.setAttribute("transform", `translate(${at} 0)`);
    for (const { r, values, dot, cell } of this.marks) {
      const value = values[positions[r]];
      say(cell, value === null ? "–" : value.toFixed(3));
      dot.setAttribute("visibility", value === null ? "hidden" : "visible");
      dot.setAttribute("cx", this.x(shareOf(this.meta.runs[r], positions[r])));
      dot.setAttribute("cy", this.y(value ?? 0));
    }
  }

  build(measure, width) {
    const lines = this.lines(measure), height = 176;
    const values = lines.flatMap((line) => line.runs.flat()).filter((value) => value !== null && value !== undefined);
    const ticks = niceTicks(Math.min(0, ...values), Math.max(0, ...values));
    const [low, high] = [ticks[0], ticks.at(-1)], [left, right, top, bottom] = [38, 10, 10, 26];
    this.span = [left, width - right];
    this.x = (share) => left + share * (width - left - right);
    this.y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
    const svg = h("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
    svg.setAttribute("aria-label", `${measure.replaceAll("_", " ")} over the steps; the table below has the values`);
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    const note = this.shade(svg, top, height - bottom, mean > (low + high) / 2);
    for (const tick of ticks) {
      const y = this.y(tick);
      svg.append(h("line", { class: "elx-grid", x1: left, x2: width - right, y1: y, y2: y }));
      svg.append(h("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, String(Number(tick.toFixed(4)))));
    }
    const last = this.reference.calls - 1, middle = Math.round(last / 2);
    for (const [step, anchor] of [[0, "start"], [middle, "middle"], [last, "end"]]) {
      if (step === middle && (step === 0 || step === last)) continue;
      const label = step === 0 ? "step 1" : String(step + 1); // people count from 1
      svg.append(h("text", { x: this.x(last ? step / last : 0), y: height - 8, "text-anchor": anchor }, label));
      if (!last) break;
    }
    this.cursor = h("g", { class: "elx-cursor" }, h("line", { x1: 0, x2: 0, y1: top - 4, y2: height - bottom }));
    svg.append(this.cursor);
    this.marks = [];
    const head = h("tr", {}, h("th", {}, h("span", { class: "elx-soft" }, "at this step")));
    this.meta.runs.forEach((run, r) => head.append(h("th", { scope: "col", title: run.name }, dashSample(r), run.name)));
    const body = h("tbody");
    for (const line of lines) {
      const swatch = h("span", { class: "elx-swatch", "--c": line.color ?? "currentColor", "--d": line.second });
      const own = [], light = (on) => {
        svg.classList.toggle("elx-dimmed", on);
        for (const part of own) part.classList.toggle("elx-hot", on);
      };
      const row = h("tr", { onpointerenter: () => light(true), onpointerleave: () => light(false) }, h("th", { scope: "row", title: line.name }, swatch, line.name));
      this.meta.runs.forEach((run, r) => {
        const cell = h("td", {}, "–"), values = line.runs[r];
        row.append(cell);
        if (!values) return;
        const style = { "--c": line.color ?? "currentColor", "stroke-dasharray": DASHES[r % DASHES.length] || null };
        const path = h("path", { class: "elx-line", d: this.path(run, values), ...style });
        const dot = h("circle", { class: "elx-dot", r: 3.5, "--c": style["--c"] });
        svg.append(path);
        own.push(path, dot);
        this.marks.push({ r, values, cell, dot });
      });
      body.append(row);
    }
    svg.append(...this.marks.map((mark) => mark.dot), note); // the label lies on top of the lines
    this.holder.replaceChildren(svg);
    this.table.replaceChildren(h("table", {}, h("thead", {}, head), body));
  }

  /** Shade the guided steps; returns their label, placed away from the lines. */
  shade(svg, top, bottom, below) {
    for (const run of this.meta.runs.filter((each) => each.guided.length)) {
      const half = run.calls > 1 ? 0.5 / (run.calls - 1) : 0.5;
      const from = this.x(Math.max(0, run.guided[0] / Math.max(1, run.calls - 1) - half));
      const to = this.x(Math.min(1, run.guided.at(-1) / Math.max(1, run.calls - 1) + half));
      svg.append(h("rect", { class: "elx-guided", x: from, y: top, width: Math.max(2, to - from), height: bottom - top }));
      // One band is enough: compared runs usually have the same guided steps, and bands would hide each other.
      return h("text", { class: "elx-note", x: from + 5, y: below ? bottom - 6 : top + 13 }, `guided by ${run.name}`);
    }
    return "";
  }

  path(run, values) {
    let pen = "M";
    return values
      .map((value, i) => {
        if (value === null) {
          pen = "M";
          return "";
        }
        const point = `${pen}${this.x(shareOf(run, i)).toFixed(1)} ${this.y(value).toFixed(1)}`;
        pen = "L";
        return point;
      })
      .join("");
  }

  seek(event) {
    if (!this.span) return;
    const share = (event.clientX - this.holder.getBoundingClientRect().left - this.span[0]) / (this.span[1] - this.span[0]);
    this.onstep(nearest(this.reference, share));
  }
}

function dashSample(r) {
  const line = { x1: 0, x2: 22, y1: 4, y2: 4, "stroke-dasharray": DASHES[r % DASHES.length] || null };
  return h("svg", { class: "elx-dash", width: 22, height: 8, "aria-hidden": "true" }, h("line", line));
}

/** Round tick values from below the lowest to above the highest value. */
function niceTicks(low, high) {
  const span = high - low || 1, rough = span / 3, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= rough * 0.999);
  const ticks = [];
  for (let i = Math.floor(low / step + 1e-9); i * step < high + step * 0.999; i++) ticks.push(i * step);
  return ticks.length > 1 ? ticks : [0, 1];
}
