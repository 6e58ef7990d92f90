// The stage: the image of the run in progress, overlays of attention and regions, and boxes that the user draws and drags.

const LEAST = 0.05; // share of the image; anything smaller counts as a click
const NUDGE = 1 / 32;
const TRAITS = ["_frame", "_entities", "_masks", "_size", "_guidance", "boxes", "entity", "token"];
const clamp = (value, low = 0, high = 1) => Math.min(Math.max(value, low), high);
const percent = (value) => Math.round(100 * value);
const tidyBox = (box) => box.map((side) => Number(side.toFixed(4)));

class Stage {
  constructor(model, root) {
    Object.assign(this, { model, root, drag: null, armed: false });
    this.colors = palette(model.get("_colors"));
    this.build();
    this.schedule = () => (this.pending ??= requestAnimationFrame(() => this.refresh()));
    for (const name of TRAITS) model.on(`change:${name}`, this.schedule);
    this.observer = new ResizeObserver(this.schedule);
    this.observer.observe(this.plot);
    this.refresh();
  }

  get(name) {
    return this.model.get(name);
  }

  /** Change traits here immediately, and in Python now or after a short delay. */
  put(changes, now = true) {
    for (const [name, value] of Object.entries(changes)) this.model.set(name, value);
    if (now) this.save();
    else this.saving ??= setTimeout(() => this.save(), 80);
    this.schedule();
  }

  save() {
    clearTimeout(this.saving);
    this.saving = undefined;
    this.model.save_changes();
  }

  close() {
    if (this.saving) this.save();
    cancelAnimationFrame(this.pending);
    for (const name of TRAITS) this.model.off(`change:${name}`, this.schedule);
    this.observer.disconnect();
  }

  // -- parts ---------------------------------------------------------------------------------------------------------

  build() {
    this.image = h("img", { alt: "", draggable: "false" });
    this.canvas = h("canvas", { "aria-hidden": "true" });
    this.outlines = h("svg", { preserveAspectRatio: "none", "aria-hidden": "true" });
    this.layer = h("div", { class: "ell-boxes" });
    this.empty = h("p", { class: "ell-empty" });
    this.view = h("div", { class: "elx-stage ell-stage" }, this.image, this.canvas, this.outlines, this.empty, this.layer);
    this.view.addEventListener("pointerdown", (event) => this.press(event));
    this.view.addEventListener("pointermove", (event) => this.move(event));
    for (const end of ["pointerup", "pointercancel"]) this.view.addEventListener(end, () => this.release());
    this.thumbs = h("div", { class: "elx-thumbs" });
    this.steps = h("div", { class: "ell-steps", role: "progressbar", "aria-label": "Steps made" });
    this.when = h("div", { class: "ell-when" });
    this.verdict = h("p", { class: "ell-verdict", hidden: true });
    this.note = h("p", { class: "elx-soft" });
    this.rows = h("div", { class: "ell-rows" });
    this.reset = h("button", { type: "button", class: "ell-button", title: "Remove all boxes and masks", onclick: () => this.clear() }, "Clear all regions");
    this.plot = h("div", { class: "elx-plot ell-plot" });
    this.loss = h("p", { class: "elx-soft" });
    const keys = h("p", { class: "elx-soft" }, "Draw boxes on the image. The stepped outlines are the regions found in the attention maps. ", h("kbd", {}, "Tab"), " selects a box, ", h("kbd", {}, "← ↑ → ↓"), " move it, ", h("kbd", {}, "Shift"), " + arrows resize it, ", h("kbd", {}, "Del"), " removes it.");
    this.root.append(
      h("div", { class: "elx-body" },
        h("div", { class: "elx-main", "--runs": 1 }, this.view, this.steps, this.when, this.verdict, this.thumbs),
        h("div", { class: "elx-side" },
          h("section", { "aria-label": "Regions by hand" },
            h("div", { class: "elx-heading" }, h("h3", {}, "Regions by hand"), this.reset), this.rows, this.note, keys),
          h("section", { "aria-label": "Guidance loss" }, h("h3", {}, "Loss"), this.plot, this.loss))),
    );
  }

  // -- boxes ---------------------------------------------------------------------------------------------------------

  boxes() {
    const entities = this.get("_entities"), boxes = this.get("boxes");
    return entities.map((_, i) => boxes[i] ?? null);
  }

  setBox(i, box, now = true) {
    const boxes = this.boxes();
    boxes[i] = box && tidyBox(box);
    this.put({ boxes }, now);
  }

  clear() {
    this.model.send({ clear: null });
  }

  /** Choose the entity whose region is drawn next, and show its attention. */
  choose(i, armed = true) {
    this.armed = armed && !this.boxes()[i];
    const entities = this.get("_entities"), maps = this.get("_frame").about?.maps ?? [];
    const shown = this.get("token") && maps.some((map) => map.label === entities[i].label);
    this.put({ entity: i, ...(shown ? { token: entities[i].label } : {}) });
  }

  /** Position of the pointer in shares of the image. */
  place(event) {
    const area = this.view.getBoundingClientRect();
    return [clamp((event.clientX - area.left) / area.width), clamp((event.clientY - area.top) / area.height), 9 / area.width, 9 / area.height];
  }

  /** Index of the box at a position: the chosen entity's, or else the smallest. */
  hit([x, y, near, nearby]) {
    const inside = (box) => box && x > box[0] - near && x < box[2] + near && y > box[1] - nearby && y < box[3] + nearby;
    const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
    const boxes = this.boxes(), chosen = this.get("entity");
    if (inside(boxes[chosen])) return chosen;
    const found = boxes.map((box, i) => [box, i]).filter(([box]) => inside(box)).sort((a, b) => area(a[0]) - area(b[0]));
    return found.length ? found[0][1] : -1;
  }

  /** Sides of a box that a drag from a position moves, as 0 or 1. */
  grip(box, [x, y, near, nearby]) {
    const at = [Math.abs(x - box[0]) < near, Math.abs(y - box[1]) < nearby, Math.abs(x - box[2]) < near, Math.abs(y - box[3]) < nearby];
    return [at[0] && !at[2], at[1] && !at[3], at[2], at[3]].map(Number);
  }

  press(event) {
    if (event.button || !this.get("_entities").length) return;
    const place = this.place(event), boxes = this.boxes();
    const chosen = Math.min(this.get("entity"), boxes.length - 1);
    const under = this.armed && !boxes[chosen] ? -1 : this.hit(place);
    this.view.setPointerCapture(event.pointerId);
    event.preventDefault();
    if (under >= 0) {
      const sides = this.grip(boxes[under], place);
      this.drag = { i: under, from: place, box: boxes[under], sides: sides.some(Boolean) ? sides : null };
      this.choose(under, false);
      this.layer.querySelector(`[data-entity="${under}"]`)?.focus();
      return;
    }
    // a press beside all boxes draws the chosen entity's, or else that of one that has none
    const free = boxes.findIndex((box) => !box);
    this.drag = { i: boxes[chosen] && free >= 0 ? free : chosen, from: place, box: null, fresh: true };
  }

  move(event) {
    const place = this.place(event);
    if (!this.drag) {
      this.view.style.cursor = this.cursor(place);
      return;
    }
    const { i, from, box, sides, fresh } = this.drag, dx = place[0] - from[0], dy = place[1] - from[1];
    if (fresh) {
      const drawn = [Math.min(from[0], place[0]), Math.min(from[1], place[1]), Math.max(from[0], place[0]), Math.max(from[1], place[1])];
      if (drawn[2] - drawn[0] < LEAST || drawn[3] - drawn[1] < LEAST) return;
      this.armed = false;
      this.drag.drawn = drawn;
      if (this.get("entity") !== i) this.choose(i, false);
      this.setBox(i, drawn, false);
    } else if (sides) {
      const sized = box.map((side, k) => (sides[k] ? clamp(side + (k % 2 ? dy : dx)) : side));
      if (sized[2] - sized[0] >= LEAST && sized[3] - sized[1] >= LEAST) this.setBox(i, sized, false);
    } else {
      this.setBox(i, shifted(box, dx, dy), false);
    }
  }

  release() {
    if (!this.drag) return;
    const { i, drawn } = this.drag;
    this.drag = null;
    if (this.saving) this.save();
    this.refresh();
    if (drawn) this.layer.querySelector(`[data-entity="${i}"]`)?.focus();
  }

  cursor(place) {
    const boxes = this.boxes(), under = this.armed ? -1 : this.hit(place);
    if (!boxes.length) return "default";
    if (under < 0) return "crosshair";
    const [left, top, right, bottom] = this.grip(boxes[under], place);
    if ((left && top) || (right && bottom)) return "nwse-resize";
    if ((left && bottom) || (right && top)) return "nesw-resize";
    return left || right ? "ew-resize" : top || bottom ? "ns-resize" : "move";
  }

  key(event, i) {
    const way = { ArrowLeft: [-NUDGE, 0], ArrowRight: [NUDGE, 0], ArrowUp: [0, -NUDGE], ArrowDown: [0, NUDGE] }[event.key];
    const box = this.boxes()[i];
    if (event.altKey || event.ctrlKey || event.metaKey || !box) return;
    if (way && event.shiftKey) {
      const sized = [box[0], box[1], clamp(box[2] + way[0], box[0] + LEAST), clamp(box[3] + way[1], box[1] + LEAST)];
      this.setBox(i, sized, false);
    } else if (way) this.setBox(i, shifted(box, ...way), false);
    else if (event.key === "Delete" || event.key === "Backspace") {
      this.setBox(i, null);
      this.rows.querySelectorAll(".ell-place")[i]?.focus();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // -- drawing -------------------------------------------------------------------------------------------------------

  refresh() {
    this.pending = undefined;
    const { about, maps } = this.get("_frame"), entities = this.get("_entities"), [width, height] = this.get("_size");
    this.view.style.setProperty("--ratio", about ? `${about.width} / ${about.height}` : `${width} / ${height}`);
    this.root.style.setProperty("--ratio", about ? `${about.width} / ${about.height}` : `${width} / ${height}`);
    this.image.hidden = !about;
    this.empty.hidden = Boolean(about);
    say(this.empty, entities.length ? "Press Run, or first draw a region for each entity." : "Enter a prompt to start.");
    this.drawFrame(about, maps);
    this.drawBoxes(entities);
    this.drawRows(entities);
    this.drawSteps(about);
    this.drawLoss(about);
  }

  drawFrame(about, maps) {
    const cells = about ? about.rows * about.columns : 0;
    const bytes = about && new Uint8Array(maps.buffer, maps.byteOffset, maps.byteLength);
    const series = (about?.maps ?? []).map(({ scale }, k) => {
      const data = Float32Array.from(bytes.subarray(k * cells, (k + 1) * cells), (level) => (level / 255) * scale);
      return { rows: about.rows, columns: about.columns, data };
    });
    const top = Math.max(0, ...(about?.maps ?? []).map(({ scale }) => scale));
    const labels = (about?.maps ?? []).map(({ label }) => label);
    const token = labels.includes(this.get("token")) ? this.get("token") : "";
    if (about && this.image.getAttribute("src") !== about.image) this.image.src = about.image;
    this.image.alt = about?.alt ?? "";
    this.image.classList.toggle("elx-coarse", Boolean(about?.coarse));
    this.image.style.filter = token ? "grayscale(1)" : "";
    this.canvas.hidden = !token;
    if (token) paint(this.canvas, series[labels.indexOf(token)], 0, top, this.colors);
    const owner = about?.outlined ? bytes.subarray(series.length * cells) : null;
    this.outlines.setAttribute("viewBox", about ? `0 0 ${about.columns} ${about.rows}` : "0 0 1 1");
    this.outlines.replaceChildren(
      ...(owner ? about.entities : []).flatMap(({ color }, i) => {
        const d = outline(owner, about.rows, about.columns, i + 1);
        return [h("path", { class: "elx-halo", d }), h("path", { class: "elx-edge", d, "--c": color })];
      }),
      ...this.get("_masks").flatMap((mask, i) => {
        if (!mask || !about) return [];
        const d = outline(Uint8Array.from(mask.cells), mask.rows, mask.columns, 1);
        const transform = `scale(${about.columns / mask.columns} ${about.rows / mask.rows})`;
        return [h("path", { class: "ell-mask", d, transform, "--c": this.get("_entities")[i]?.color })];
      }),
    );
    const key = JSON.stringify([labels, Boolean(about)]);
    if (this.filled !== key) {
      this.filled = key;
      this.small = about ? [this.thumb("", "image", null), ...about.maps.map((map) => this.thumb(map.label, map.label, map.color))] : [];
      this.thumbs.replaceChildren(...this.small.map(({ button }) => button));
      this.thumbs.style.setProperty("--thumbs", Math.max(1, this.small.length));
    }
    for (const { label, button, show } of this.small) {
      button.setAttribute("aria-pressed", label === token);
      if (!label) show.src = about.image;
      else paint(show, series[labels.indexOf(label)], 0, top, this.colors);
    }
    const peak = token ? `. Attention of ${token}: maximum ${shortNumber(about.maps[labels.indexOf(token)].scale)}` : "";
    this.view.setAttribute("aria-label", (about?.alt ?? "No image yet.") + peak);
    this.view.setAttribute("role", "group");
  }

  thumb(label, text, color) {
    const show = label ? h("canvas", { "aria-hidden": "true" }) : h("img", { alt: "", class: "elx-coarse" });
    const button = h(
      "button",
      { type: "button", class: "elx-thumb", title: label ? `Attention of ${text}` : "Image without overlay", onclick: () => this.look(label) },
      show, h("span", { class: "elx-label", style: color ? `--c: ${color}` : null }, text),
    );
    return { label, button, show };
  }

  look(label) {
    const entities = this.get("_entities"), map = (this.get("_frame").about?.maps ?? []).find((each) => each.label === label);
    const i = entities.findIndex((entity) => entity.label === map?.owner);
    this.put({ token: label, ...(i >= 0 ? { entity: i } : {}) });
  }

  drawBoxes(entities) {
    const boxes = this.boxes(), masks = this.get("_masks"), there = new Map();
    for (const node of [...this.layer.children]) {
      if (boxes[node.dataset.entity]) there.set(Number(node.dataset.entity), node);
      else node.remove();
    }
    boxes.forEach((box, i) => {
      if (!box) return;
      let node = there.get(i);
      if (!node) {
        node = h("div", { class: "ell-box", tabindex: "0", role: "group", "aria-roledescription": "movable region", "data-entity": String(i), onkeydown: (event) => this.key(event, i), onfocus: () => this.get("entity") === i || this.choose(i, false) }, h("span", { class: "ell-name" }), ...["nw", "ne", "sw", "se"].map((corner) => h("i", { class: `ell-corner ell-${corner}` })));
        this.layer.append(node);
      }
      const [left, top, right, bottom] = box;
      node.style.cssText = `left:${100 * left}%;top:${100 * top}%;width:${100 * (right - left)}%;height:${100 * (bottom - top)}%`;
      node.style.setProperty("--c", entities[i].color);
      node.classList.toggle("ell-chosen", i === this.get("entity"));
      say(node.firstChild, entities[i].label);
      node.setAttribute("aria-label", `Region of ${entities[i].label}: ${spell(box)}`);
    });
    this.reset.disabled = !boxes.some(Boolean) && !masks.some(Boolean);
  }

  drawRows(entities) {
    const boxes = this.boxes(), masks = this.get("_masks"), { note, takes, needs } = this.get("_guidance");
    const key = JSON.stringify(entities);
    if (this.listed !== key) {
      this.listed = key;
      this.list = entities.map(({ label, color }, i) => {
        const name = h("button", { type: "button", class: "ell-entity", title: "Draw the region of this entity next", onclick: () => this.choose(i) }, h("span", { class: "elx-swatch", "--c": color }), h("span", {}, label));
        const where = h("span", { class: "ell-where" });
        const act = h("button", { type: "button", class: "ell-button ell-place", onclick: () => this.placeOrClear(i) });
        return { row: h("div", { class: "ell-row" }, name, where, act), name, where, act };
      });
      this.rows.replaceChildren(...this.list.map(({ row }) => row));
    }
    this.list.forEach(({ name, where, act }, i) => {
      name.setAttribute("aria-pressed", i === this.get("entity"));
      say(where, boxes[i] ? spell(boxes[i]) : masks[i] ? "mask" : !takes ? "–" : needs ? "missing" : "localized");
      say(act, boxes[i] || masks[i] ? "Clear" : "Place");
      act.setAttribute("aria-label", `${act.textContent} the region of ${entities[i].label}`);
    });
    say(this.note, note);
    this.note.hidden = !note;
  }

  placeOrClear(i) {
    if (this.boxes()[i] || this.get("_masks")[i]) {
      this.model.send({ clear: i });
      return;
    }
    const count = this.get("_entities").length, left = i / count;
    this.setBox(i, [left, 0.25, left + 1 / count, 0.75]);
    this.choose(i, false);
    this.refresh();
    this.layer.querySelector(`[data-entity="${i}"]`)?.focus();
  }

  drawSteps(about) {
    const { guided, steps: planned, state } = this.get("_guidance");
    const steps = about?.steps ?? planned, made = about ? about.step + 1 : 0, key = JSON.stringify([steps, guided]);
    if (this.stepped !== key) {
      this.stepped = key;
      const marks = Array.from({ length: steps }, (_, i) => h("i", { class: guided.includes(i) ? "ell-guided" : "" }));
      this.steps.replaceChildren(...marks);
      this.steps.style.gap = steps > 100 ? "0" : "";
    }
    [...this.steps.children].forEach((mark, i) => mark.classList.toggle("ell-made", i < made));
    for (const [name, value] of [["valuemin", 0], ["valuemax", steps], ["valuenow", made]]) this.steps.setAttribute(`aria-${name}`, value);
    const held = guided.length ? ` · guided steps are underlined` : "";
    say(this.when, about ? `step ${made} of ${steps}${state === "paused" ? " · paused" : ""}${held}` : `${steps} steps${held}`);
    say(this.verdict, about?.verdict ? `Judge: ${about.verdict}.` : "");
    this.verdict.hidden = !about?.verdict;
  }

  drawLoss(about) {
    const losses = about?.losses ?? [], width = Math.max(220, Math.round(this.plot.clientWidth || 300)), height = 120;
    const key = JSON.stringify([losses, width, about?.steps]);
    if (this.plotted === key) return;
    this.plotted = key;
    this.plot.hidden = !losses.length;
    say(this.loss, losses.length ? lossNote(losses) : this.get("_guidance").quiet);
    if (!losses.length) return;
    const values = losses.map(([, loss]) => loss);
    const ticks = niceTicks(Math.min(0, ...values), Math.max(...values)), [low, high] = [ticks[0], ticks.at(-1)];
    const [left, right, above, below] = [38, 10, 8, 22], last = Math.max(1, losses.at(-1)[0], ...this.get("_guidance").guided);
    const x = (step) => left + (step / last) * (width - left - right);
    const y = (value) => height - below - ((value - low) / (high - low)) * (height - above - below);
    const svg = h("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Loss over the guided steps, from ${shortNumber(values[0])} to ${shortNumber(values.at(-1))}` });
    for (const tick of ticks) {
      svg.append(h("line", { class: "elx-grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }));
      svg.append(h("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, String(Number(tick.toFixed(4)))));
    }
    svg.append(h("text", { x: x(0), y: height - 6, "text-anchor": "start" }, "step 1"));
    svg.append(h("text", { x: x(last), y: height - 6, "text-anchor": "end" }, String(last + 1)));
    const points = losses.map(([step, loss]) => `${x(step).toFixed(1)} ${y(loss).toFixed(1)}`);
    svg.append(h("path", { class: "elx-line", d: `M${points.join("L")}`, "--c": "var(--accent)" }));
    const [step, loss] = losses.at(-1);
    svg.append(h("circle", { class: "elx-dot", r: 3.5, cx: x(step), cy: y(loss), "--c": "var(--accent)" }));
    this.plot.replaceChildren(svg);
  }
}

/** A box moved by an offset, kept inside the image. */
function shifted(box, dx, dy) {
  const x = clamp(dx, -box[0], 1 - box[2]), y = clamp(dy, -box[1], 1 - box[3]);
  return [box[0] + x, box[1] + y, box[2] + x, box[3] + y];
}

/** The last loss, compared with the first if there are several. */
function lossNote(losses) {
  const [[from, first], [step, loss]] = [losses[0], losses.at(-1)];
  return `The loss is ${shortNumber(loss)} at step ${step + 1}${step === from ? "." : `; it was ${shortNumber(first)} at step ${from + 1}.`}`;
}

function spell([left, top, right, bottom]) {
  return `x ${percent(left)}–${percent(right)}%, y ${percent(top)}–${percent(bottom)}%`;
}

function render({ model, el }) {
  const root = h("div", { class: "elx ell", role: "region", "aria-label": "Image and regions", "data-lm-suppress-shortcuts": "true" });
  el.append(root);
  const stage = new Stage(model, root);
  return () => stage.close();
}

export default { render };
