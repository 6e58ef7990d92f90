// The view: its elements are created once and updated whenever the model changes. All state lives in the model, so that
// Python, this view and other views of the same widget stay synchronized.

const SHARED = [
  "step", "tokens", "token", "layer", "size", "head", "normalization", "shared_scale", "measure", "regions", "predicted",
  "opacity", "smooth", "colors", "speed", "playing",
];
const PLACES = { down: "down (encoder)", mid: "middle", up: "up (decoder)" };
const VALUES = { none: "probability", sum: "share of map", start: "× start-of-text" };
const SPEEDS = [2, 4, 8, 15, 30];
const PLAY = "M4 2.5v11l9-5.5z", PAUSE = "M4 2.5h3v11H4zM9.5 2.5h3v11h-3z";
const players = new WeakMap(); // the one view of a model that runs its playback

class View {
  constructor(model, root, maps) {
    Object.assign(this, { model, root, maps, meta: model.get("_meta"), hover: null, preferredSize: model.get("size") });
    this.choices = this.meta.choices;
    this.reference = this.meta.runs[this.meta.reference];
    // Step positions of every run for each position of the reference run.
    this.positions = this.reference.steps.map((_, i) => {
      const share = shareOf(this.reference, i);
      return this.meta.runs.map((run) => (run === this.reference ? i : nearest(run, share)));
    });
    this.palettes = Object.fromEntries(Object.entries(this.meta.colors).map(([name, hex]) => [name, palette(hex)]));
    this.controls = [];
    this.build();
    this.schedule = () => (this.pending ??= requestAnimationFrame(() => this.refresh()));
    for (const name of SHARED) model.on(`change:${name}`, this.schedule);
    this.onkey = (event) => this.key(event);
    root.addEventListener("keydown", this.onkey);
    // Keys work as soon as the pointer is over the explorer, unless the user is typing elsewhere.
    root.addEventListener("pointerenter", () => {
      if ([null, document.body].includes(document.activeElement)) root.focus({ preventScroll: true });
    });
    // After a click with the pointer, keys go to the explorer again (space plays instead of repeating the click).
    root.addEventListener("click", (event) => {
      if (event.detail > 0 && event.target.closest("button")) root.focus({ preventScroll: true });
    });
    this.observer = new ResizeObserver(this.schedule);
    this.observer.observe(this.plot.holder);
    this.refresh();
  }

  get(name) {
    return this.model.get(name);
  }

  /** Change settings here immediately, and in Python after a short delay. */
  put(changes) {
    for (const [name, value] of Object.entries(changes)) this.model.set(name, value);
    this.saving ??= setTimeout(() => this.save(), 200);
  }

  save() {
    clearTimeout(this.saving);
    this.saving = undefined;
    this.model.save_changes();
  }

  close() {
    if (this.saving) this.save();
    cancelAnimationFrame(this.pending);
    cancelAnimationFrame(this.tick);
    if (players.get(this.model) === this) players.delete(this.model);
    for (const name of SHARED) this.model.off(`change:${name}`, this.schedule);
    this.observer.disconnect();
  }

  // -- parts ---------------------------------------------------------------------------------------------------------

  build() {
    const { runs, notes } = this.meta;
    const prompts = this.prompts();
    this.plot = new Plot(this.meta, {
      onstep: (position) => this.go(position),
      onmeasure: (measure) => this.put({ measure }),
    });
    this.columns = runs.map((run, r) => this.column(run, this.maps[r]));
    const images = h("div", { class: "elx-runs" }, ...this.columns.map((column) => column.element));
    const foot = h("div", { class: "elx-foot" });
    const lines = [...notes, ...runs.flatMap((run) => run.notes.map((note) => (runs.length > 1 ? `${run.name}: ${note}` : note)))];
    // a run with an image for each step has a box that switches to it
    const kept = runs.filter((run) => run.predicted).length;
    const where = kept ? "In runs without predicted images" : "At every step";
    const under = kept < runs.length ? [`${where}, attention lies over the finished image.`] : [];
    for (const note of [...under, ...lines]) foot.append(h("p", {}, note));
    foot.append(this.help());
    this.root.style.setProperty("--runs", Math.min(3, runs.length));
    this.root.append(
      ...prompts,
      h(
        "div",
        { class: "elx-body" },
        h("div", { class: "elx-main" }, images, this.transport(), this.colorBar()),
        h("div", { class: "elx-side" }, this.plot.element, this.settings()),
      ),
      foot,
    );
  }

  help() {
    const entities = this.numbered.length;
    const keys = [["←", "→"], ["space"], ["↑", "↓"], entities > 1 ? ["1", "–", String(Math.min(9, entities))] : ["1"]];
    const what = ["step", "play", "layer", entities > 1 ? "entities" : "entity"];
    const legend = keys.map((names, i) => {
      const shown = names.map((name) => (name === "–" ? "–" : h("kbd", {}, name)));
      return h("span", {}, ...shown, ` ${what[i]}`);
    });
    return h("p", { class: "elx-keys" }, "Keys: ", ...legend);
  }

  /** The prompts, word by word; a single line where all runs share one. */
  prompts() {
    const byText = Map.groupBy ? Map.groupBy(this.meta.runs, (run) => run.prompt) : new Map();
    if (!byText.size) for (const run of this.meta.runs) byText.set(run.prompt, [...(byText.get(run.prompt) ?? []), run]);
    const nouns = this.meta.runs.flatMap((run) => run.words.filter((word) => word.entity !== null).map((word) => word.label));
    this.numbered = [...new Set(nouns)].slice(0, 9); // entities with a number key
    this.chips = [];
    return [...byText.values()].map((runs) => {
      const line = h("div", { class: "elx-prompt", role: "group", "aria-label": `Words of “${runs[0].prompt}”` });
      if (byText.size > 1) line.append(h("span", { class: "elx-whose" }, runs.map((run) => run.name).join(", ")));
      for (const chip of runs[0].chips) line.append(chip.gap ? " " : "", this.chip(runs[0], chip));
      return line;
    });
  }

  chip(run, { text, token, special }) {
    if (token === null) return h("span", { class: "elx-word", title: "not recorded" }, text);
    const { label, entity, attribute } = run.words[token], owner = entity ?? attribute;
    const number = entity === null ? 0 : this.numbered.indexOf(label) + 1;
    const kind = special ? " elx-special" : entity !== null ? " elx-entity" : attribute !== null ? " elx-attribute" : "";
    const about = special
      ? "special token"
      : entity !== null ? `entity${number ? `, key ${number}` : ""}`
      : attribute !== null ? `attribute of ${run.entities[attribute].label}` : "word";
    const button = h(
      "button",
      {
        type: "button", class: `elx-chip${kind}`, title: `${tokenTitle(label)}: ${about}`, onclick: () => this.choose(label),
        "--c": owner === null ? null : run.entities[owner].color,
      },
      text, number && this.numbered.length > 1 ? h("sup", { "aria-hidden": "true" }, String(number)) : null,
    );
    this.chips.push({ button, label });
    return button;
  }

  column(run, maps) {
    const column = { run, maps };
    const outcome = run.outcome;
    const verdict = outcome && h("span", { class: outcome.right ? "elx-good" : "elx-bad" }, outcome.right ? "✓ right" : "✗ wrong");
    column.when = h("span", { class: "elx-when" });
    const seed = run.name.includes("seed") ? null : h("span", { class: "elx-soft" }, `seed ${run.seed}`);
    const title = h("div", { class: "elx-title" }, h("h3", { title: run.name }, run.name), seed, verdict, column.when);
    column.canvas = h("canvas", {});
    column.none = h("p", { class: "elx-none" });
    const grid = run.regions ?? { rows: 1, columns: 1 };
    const halo = run.entities.map(() => h("path", { class: "elx-halo" }));
    const edge = run.entities.map(({ color }) => h("path", { class: "elx-edge", "--c": color }));
    column.paths = halo.map((path, i) => [path, edge[i]]);
    const view = { viewBox: `0 0 ${grid.columns} ${grid.rows}`, preserveAspectRatio: "none" };
    column.contours = h("svg", view, ...halo, ...edge);
    column.cell = h("div", { class: "elx-cell", hidden: true });
    column.image = h("img", { src: run.image, alt: "", class: run.coarse ? "elx-coarse" : null, draggable: "false" });
    column.stage = h(
      "div",
      { class: "elx-stage", role: "img", "--ratio": `${run.width} / ${run.height}` },
      column.image, column.canvas, column.contours, column.cell, column.none,
    );
    column.stage.addEventListener("pointermove", (event) => {
      const box = column.stage.getBoundingClientRect(), inside = (value) => Math.min(Math.max(value, 0), 0.9999);
      this.hover = { y: inside((event.clientY - box.top) / box.height), x: inside((event.clientX - box.left) / box.width) };
      this.schedule();
    });
    column.stage.addEventListener("pointerleave", () => {
      this.hover = null;
      this.schedule();
    });
    column.readout = h("p", { class: "elx-readout" });
    column.thumbs = h("div", { class: "elx-thumbs", role: "group", "aria-label": `Maps of ${run.name}` });
    const verdictLine = this.meta.runs.some((each) => each.outcome) ? h("p", { class: "elx-said", title: outcome?.verdict }, outcome?.verdict ?? "") : null;
    column.element = h(
      "section", { class: "elx-run", "aria-label": run.name }, title, verdictLine, column.stage, column.readout, column.thumbs,
    );
    return column;
  }

  /** Thumbnails below an image: the image itself and the maps of the selected words. */
  fillThumbs(column) {
    const { run, thumbs } = column;
    const thumb = (label, shown, pick, color) =>
      h(
        "button", { type: "button", class: "elx-thumb", onclick: pick, "--ratio": `${run.width} / ${run.height}` },
        shown, h("span", { class: "elx-label", "--c": color, title: label }, label),
      );
    const image = h("img", { src: run.image, alt: "", class: run.coarse ? "elx-coarse" : null });
    column.bare = thumb("image", image, () => this.put({ opacity: this.get("opacity") > 0 ? 0 : 0.75 }), null);
    column.small = this.get("tokens").map((label) => {
      const canvas = h("canvas", {}), word = run.words.find((each) => each.label === label);
      const owner = word ? word.entity ?? word.attribute : null;
      const button = thumb(tokenTitle(label), canvas, () => this.look(label), owner === null ? null : run.entities[owner].color);
      button.hidden = !word;
      return { label, canvas, button };
    });
    thumbs.style.setProperty("--thumbs", 1 + column.small.filter(({ button }) => !button.hidden).length);
    thumbs.replaceChildren(column.bare, ...column.small.map((each) => each.button));
  }

  transport() {
    const last = this.positions.length - 1;
    const icon = h("path", { d: PLAY });
    this.playIcon = icon;
    this.playButton = h(
      "button", { type: "button", class: "elx-play", disabled: last < 1, onclick: () => this.put({ playing: !this.get("playing") }) },
      h("svg", { viewBox: "0 0 16 16", width: 16, height: 16, "aria-hidden": "true" }, icon),
    );
    this.slider = h("input", {
      type: "range", min: 0, max: last, step: 1, "aria-label": "Step", disabled: last < 1,
      oninput: () => this.go(Number(this.slider.value)),
    });
    this.stepText = h("output", { class: "elx-step" });
    const speed = this.select("speed", "Speed", [...SPEEDS], (value) => `${value} steps/s`);
    return h("div", { class: "elx-transport" }, this.playButton, this.slider, this.stepText, speed.select);
  }

  colorBar() {
    this.ramp = h("canvas", { "aria-hidden": "true" });
    this.ticks = [0, 1, 2].map(() => h("span"));
    this.unit = h("span", { class: "elx-unit" });
    const scale = h("div", { class: "elx-scale" }, this.ramp, h("div", { class: "elx-ticks" }, ...this.ticks));
    return h("div", { class: "elx-bar" }, this.unit, scale);
  }

  settings() {
    const { layer, size, head, normalization, colors } = this.choices;
    const layers = this.meta.runs.flatMap((run) => run.layers);
    const named = new Map(layers.map((each) => [each.name, each]));
    const sized = new Map(layers.map((each) => [each.size, each]));
    const count = (place) => this.reference.layers.filter((each) => place === "all" || each.place === place).length;
    const grid = ([rows, columns]) => `${rows}×${columns}`;
    const layerText = (value) => {
      const one = named.get(value);
      if (one) return `${one.short} · ${grid(one.recorded)}`;
      return value === "all" ? `all ${count("all")} layers` : `${PLACES[value] ?? value}: ${plural(count(value), "layer")}`;
    };
    const sizeText = (value) => {
      if (value === null) return "all sizes";
      const { recorded, rows, columns } = sized.get(value), sent = grid([rows, columns]);
      return grid(recorded) === sent ? sent : `${grid(recorded)} as ${sent}`;
    };
    const fields = [
      this.select("layer", "Layers", layer, layerText, (value) => this.pickLayer(value)),
      this.select("size", "Resolution", size, sizeText, (value) => this.put({ size: (this.preferredSize = value) })),
      head.length > 1 ? this.select("head", "Heads", head, (value) => (value === "mean" ? "mean of all" : `head ${value}`)) : null,
      this.select("normalization", "Values", normalization, (value) => VALUES[value]),
      this.select("shared_scale", "Color scale", [true, false], (value) => (value ? "shared by all maps" : "one per map")),
      this.select("colors", "Colors", colors, (value) => value),
    ].filter(Boolean);
    fields[0].field.classList.add("elx-wide");
    this.sizeField = fields[1].select;
    this.opacity = h("input", {
      type: "range", min: 0, max: 100, "aria-label": "Opacity of attention over the image",
      oninput: () => this.put({ opacity: Number(this.opacity.value) / 100 }),
    });
    const box = (name, text) => {
      const input = h("input", { type: "checkbox", onchange: () => this.put({ [name]: input.checked }) });
      this.controls.push(() => (input.checked = this.get(name)));
      return h("label", { class: "elx-check" }, input, text);
    };
    const overlay = h("label", { class: "elx-field" }, h("span", {}, "Opacity"), this.opacity);
    const keptSteps = this.meta.runs.some((run) => run.predicted);
    const boxes = h(
      "div", { class: "elx-checks" },
      box("regions", "Regions"), box("smooth", "Smooth"), keptSteps ? box("predicted", "Predicted image") : null,
    );
    return h("section", { class: "elx-settings", "aria-label": "Display settings" }, ...fields.map((each) => each.field), overlay, boxes);
  }

  select(name, title, values, text, pick = (value) => this.put({ [name]: value })) {
    const select = h("select", { "aria-label": title, onchange: () => pick(values[select.selectedIndex]) });
    select.append(...values.map((value) => h("option", {}, text(value))));
    this.controls.push(() => {
      const value = this.get(name);
      if (!values.includes(value)) select.append(h("option", {}, text(values[values.push(value) - 1]))); // a speed set from Python
      select.selectedIndex = values.indexOf(value);
    });
    return { select, field: h("label", { class: "elx-field" }, h("span", {}, title), select) };
  }

  // -- interaction ---------------------------------------------------------------------------------------------------

  position() {
    return Math.max(0, this.choices.step.indexOf(this.get("step")));
  }

  go(position) {
    const last = this.positions.length - 1;
    this.put({ step: this.choices.step[Math.min(Math.max(position, 0), last)] });
  }

  /** Add a word and show it in the large view; if it already is in the large view, remove it. */
  choose(label) {
    const tokens = this.get("tokens");
    if (!tokens.includes(label) || this.get("token") !== label) return this.look(label);
    const rest = tokens.filter((each) => each !== label);
    if (rest.length) this.put({ tokens: rest, token: rest[Math.min(tokens.indexOf(label), rest.length - 1)] });
  }

  look(label) {
    const wanted = new Set([...this.get("tokens"), label]);
    const tokens = this.choices.tokens.filter((each) => wanted.has(each));
    this.put({ tokens, token: label, ...(this.get("opacity") > 0 ? {} : { opacity: 0.75 }) });
  }

  pickLayer(layer) {
    // Layers without maps of the chosen resolution show what they have; the choice comes back with layers that have it.
    const sizes = this.sizesOf(layer), size = this.preferredSize;
    this.put({ layer, size: size === null || sizes.has(size) ? size : sizes.size === 1 ? [...sizes][0] : null });
  }

  sizesOf(layer) {
    const layers = this.meta.runs.flatMap((run) => run.layers);
    return new Set(layers.filter((each) => layer === "all" || [each.place, each.name].includes(layer)).map((each) => each.size));
  }

  key(event) {
    const { target, key } = event, slides = target.type === "range" && target !== this.slider;
    if (event.altKey || event.ctrlKey || event.metaKey || target.tagName === "SELECT") return;
    const layers = this.choices.layer, at = layers.indexOf(this.get("layer"));
    const label = /^[1-9]$/.test(key) ? this.numbered[key - 1] : key === "0" && this.choices.tokens.includes(START) ? START : undefined;
    if (key === "ArrowLeft" && !slides) this.go(this.position() - 1);
    else if (key === "ArrowRight" && !slides) this.go(this.position() + 1);
    else if (key === "Home" && !slides) this.go(0);
    else if (key === "End" && !slides) this.go(Infinity);
    else if (key === " " && target.tagName !== "BUTTON" && target.type !== "checkbox") this.put({ playing: !this.get("playing") && this.positions.length > 1 });
    else if (key === "ArrowUp" && !slides) this.pickLayer(layers[Math.max(0, at - 1)]);
    else if (key === "ArrowDown" && !slides) this.pickLayer(layers[Math.min(layers.length - 1, at + 1)]);
    else if (label) this.look(label);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  play() {
    const owner = players.get(this.model);
    if (this.tick || (owner && owner !== this)) return;
    players.set(this.model, this);
    if (this.position() === this.positions.length - 1) this.go(0);
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    let due = performance.now();
    const tick = (now) => {
      if (!this.get("playing")) {
        this.tick = undefined;
        players.delete(this.model);
        return;
      }
      const wait = 1000 / (calm ? Math.min(2, this.get("speed")) : this.get("speed"));
      if (now - due >= wait) {
        due = Math.max(due + wait, now - wait);
        if (this.position() === this.positions.length - 1) this.put({ playing: false });
        else this.go(this.position() + 1);
      }
      this.tick = requestAnimationFrame(tick);
    };
    this.tick = requestAnimationFrame(tick);
  }

  // -- drawing -------------------------------------------------------------------------------------------------------

  refresh() {
    this.pending = undefined;
    const tokens = this.get("tokens"), token = this.get("token"), key = JSON.stringify(tokens);
    if (this.filled !== key) {
      this.filled = key;
      this.columns.forEach((column) => this.fillThumbs(column));
    }
    for (const { button, label } of this.chips) {
      button.setAttribute("aria-pressed", tokens.includes(label));
      button.classList.toggle("elx-current", label === token);
    }
    for (const control of this.controls) control();
    const sizes = this.sizesOf(this.get("layer"));
    this.choices.size.forEach((size, i) => (this.sizeField.options[i].disabled = size !== null && !sizes.has(size)));
    this.opacity.value = Math.round(this.get("opacity") * 100);
    this.slider.value = this.position();
    const step = this.get("step") + 1, calls = this.reference.calls; // people count from 1
    const text = this.reference.averaged ? `mean of ${this.reference.averaged} steps` : `step ${step} of ${calls}`;
    say(this.stepText, text);
    this.slider.setAttribute("aria-valuetext", text);
    const playing = this.get("playing");
    this.playIcon.setAttribute("d", playing ? PAUSE : PLAY);
    this.playButton.setAttribute("aria-label", playing ? "Pause" : "Play");
    if (playing) this.play();
    this.draw();
    this.plot.update(this.get("measure"), this.positions[this.position()]);
  }

  draw() {
    const positions = this.positions[this.position()], colors = this.palettes[this.get("colors")];
    const chosen = Object.fromEntries(["layer", "size", "head", "normalization"].map((name) => [name, this.get(name)]));
    const shared = this.get("shared_scale"), opacity = this.get("opacity");
    const top = shared ? this.sharedTop(chosen) : 0;
    const rendering = this.get("smooth") ? "auto" : "pixelated";
    this.drawBar(top, shared, colors);
    this.columns.forEach((column, r) => {
      const position = positions[r], { run, maps } = column, token = this.wordIn(run);
      const series = maps.series(token, chosen), there = typeof series !== "string";
      column.canvas.hidden = !there;
      say(column.none, there || opacity === 0 ? "" : `${series[0].toUpperCase()}${series.slice(1)}.`);
      if (there) paint(column.canvas, series, position, shared ? top : series.tops[position], colors);
      column.canvas.style.opacity = opacity;
      const source = (this.get("predicted") && run.predicted?.[position]) || run.image;
      if (column.image.getAttribute("src") !== source) column.image.src = source;
      column.canvas.style.imageRendering = rendering;
      column.image.style.filter = there ? `grayscale(${Math.min(1, opacity * 1.4)})` : "";
      const paths = this.get("regions") ? maps.regionPaths(position) : [];
      column.paths.forEach((pair, i) => pair.forEach((path) => path.setAttribute("d", paths[i] ?? "")));
      column.bare.setAttribute("aria-pressed", opacity === 0);
      for (const { label, canvas, button } of column.small) {
        const small = maps.series(label, chosen);
        canvas.style.visibility = typeof small === "string" ? "hidden" : "visible";
        if (typeof small !== "string") paint(canvas, small, position, shared ? top : small.tops[position], colors);
        canvas.style.imageRendering = rendering;
        button.setAttribute("aria-pressed", label === token && opacity > 0);
      }
      this.describe(column, position, series, token, opacity);
    });
  }

  /** Word of the large view in a run: the chosen one or, if its prompt lacks it, the entity with the same index. */
  wordIn(run) {
    const token = this.get("token"), has = (each, label) => each.words.find((word) => word.label === label);
    if (has(run, token)) return token;
    const entity = this.meta.runs.map((each) => has(each, token)?.entity ?? null).find((each) => each !== null);
    return run.words.find((word) => word.entity !== null && word.entity === entity)?.label ?? token;
  }

  /** Readout of the location under the pointer, or of the maximum; the same text goes to screen readers. */
  describe(column, position, series, token, opacity) {
    const { run, maps } = column, timestep = run.timesteps[position];
    const when = run.averaged ? `mean of ${run.averaged} steps` : `step ${run.steps[position] + 1}${timestep === null ? "" : ` · t ${timestep < 10 ? timestep : Math.round(timestep)}`}`;
    say(column.when, when);
    const verdict = run.outcome ? ` ${run.outcome.verdict}.` : "";
    const alone = `Image of “${run.prompt}” by ${run.name}, seed ${run.seed}.${verdict}`;
    if (typeof series === "string") {
      column.cell.hidden = true;
      say(column.readout, "\u00a0");
      column.stage.setAttribute("aria-label", alone);
      return;
    }
    const { rows, columns, data } = series;
    const peak = { y: Math.floor(series.peaks[position] / columns), x: series.peaks[position] % columns };
    const cell = this.hover ? { y: Math.floor(this.hover.y * rows), x: Math.floor(this.hover.x * columns) } : peak;
    const value = this.number(data[(position * rows + cell.y) * columns + cell.x]);
    const place = this.hover ?? { y: (cell.y + 0.5) / rows, x: (cell.x + 0.5) / columns };
    const owner = run.regions && maps.entityAt(position, place.y, place.x);
    const where = owner === null ? "" : owner < 0 ? ", outside all regions" : `, in the region of ${run.entities[owner].label}`;
    const name = tokenTitle(token);
    say(column.readout, `${this.hover ? name : `${name}, maximum`}: ${value} at y ${cell.y}, x ${cell.x}${where}`);
    column.cell.hidden = !this.hover;
    if (this.hover) {
      column.cell.style.cssText = `left:${(100 * cell.x) / columns}%;top:${(100 * cell.y) / rows}%;width:${100 / columns}%;height:${100 / rows}%`;
    } else {
      const seen = opacity > 0 ? ` Overlay: attention of ${name}, ${when}; maximum ${value} at row ${cell.y}, column ${cell.x} of ${rows} by ${columns}${where}.` : "";
      column.stage.setAttribute("aria-label", alone + seen);
    }
  }

  number(value) {
    if (this.get("normalization") === "sum") return `${shortNumber(100 * value)}%`;
    return this.get("normalization") === "start" ? `${shortNumber(value)}×` : shortNumber(value);
  }

  /** Largest value of the selected words over all runs and steps. */
  sharedTop(chosen) {
    const key = JSON.stringify([chosen, this.get("tokens")]);
    if (this.topOf?.key !== key) {
      const all = this.maps.flatMap((maps) => this.get("tokens").map((label) => maps.series(label, chosen)));
      this.topOf = { key, top: all.reduce((top, series) => (typeof series === "string" ? top : Math.max(top, series.top)), 0) };
    }
    return this.topOf.top;
  }

  drawBar(top, shared, colors) {
    if (this.barColors !== colors) {
      this.barColors = colors;
      paint(this.ramp, { rows: 1, columns: 256, data: Float32Array.from({ length: 256 }, (_, i) => i) }, 0, 255, colors);
    }
    const marks = shared ? [0, top / 2, top].map((value) => this.number(value)) : ["0", "", "maximum of each map"];
    this.ticks.forEach((tick, i) => say(tick, marks[i]));
    say(this.unit, this.meta.units[this.get("normalization")]);
  }
}

function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

function render({ model, el }) {
  const root = h("div", {
    class: "elx", role: "region", "aria-label": "Attention explorer", tabindex: "0", "data-lm-suppress-shortcuts": "true",
  });
  const status = h("p", { class: "elx-status", role: "status" }, "Unpacking maps…");
  root.append(status);
  el.append(root);
  let view, gone = false;
  unpack(model.get("_meta"), model.get("_maps"))
    .then((maps) => {
      if (gone) return;
      status.remove();
      view = new View(model, root, maps);
    })
    .catch((error) => {
      console.error(error);
      status.textContent = `The explorer cannot be displayed: ${error.message}`;
    });
  return () => {
    gone = true;
    view?.close();
  };
}

const explorer = { render };
export default explorer;
