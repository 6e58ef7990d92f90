// Maps: unpacking the data sent by Python (see packing.py), means over layers and heads, normalization, colors, outlines.

const START = "<start>";
const SPECIAL = { [START]: "start-of-text", "<end>": "end-of-text and padding" };

/** Name of a token in sentences: the label of a word, or the name of a special token. */
const tokenTitle = (label) => SPECIAL[label] ?? label;
const KEPT = 64; // normalized series that are cached

/** Unpack the maps of every run from deflated bytes. */
async function unpack(meta, packed) {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("This browser cannot unpack the maps; use Chrome or Edge 80, Firefox 113, Safari 16.4 or later.");
  }
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const scales = new Float32Array(buffer, 0, meta.scales);
  const bytes = new Uint8Array(buffer, 4 * meta.scales);
  return meta.runs.map((run) => new RunMaps(run, bytes, scales));
}

/** Attention maps and regions of one run. */
class RunMaps {
  constructor(run, bytes, scales) {
    Object.assign(this, { run, bytes, scales, steps: run.steps.length, words: run.words.length });
    this.columnOf = new Map(run.words.map((word, i) => [word.label, i]));
    this.cache = new Map();
    this.outlines = new Map();
    for (const layer of run.layers) {
      const stride = layer.heads.length * this.words * layer.rows * layer.columns;
      for (let i = layer.at + stride, end = layer.at + stride * this.steps; i < end; i++) bytes[i] += bytes[i - stride];
    }
  }

  /** Maps of a word at every step: {rows, columns, data, tops, top}, or a string with the reason why there are none. */
  series(word, chosen) {
    const key = JSON.stringify([word, chosen.layer, chosen.size, chosen.head, chosen.normalization]);
    let found = this.cache.get(key);
    if (!found) {
      found = this.normalized(word, chosen);
      if (this.cache.size >= KEPT) this.cache.delete(this.cache.keys().next().value);
    }
    this.cache.delete(key); // the most recently used entry is evicted last
    this.cache.set(key, found);
    return found;
  }

  normalized(word, chosen) {
    if (chosen.normalization !== "none") {
      const raw = this.series(word, { ...chosen, normalization: "none" });
      if (typeof raw === "string") return raw;
      if (chosen.normalization === "sum") return withTops({ ...raw, data: shares(raw) });
      const start = this.series(START, { ...chosen, normalization: "none" });
      if (typeof start === "string") return "start-of-text was not recorded";
      return withTops({ ...raw, data: raw.data.map((value, i) => (start.data[i] > 0 ? value / start.data[i] : 0)) });
    }
    const column = this.columnOf.get(word);
    if (column === undefined) return `no attention of “${tokenTitle(word)}” was recorded here`;
    const fits = (layer) => chosen.layer === "all" || chosen.layer === layer.place || chosen.layer === layer.name;
    const layers = this.run.layers.filter(fits);
    if (!layers.length) return "this model has no such layer";
    const sized = layers.filter((layer) => chosen.size === null || chosen.size === layer.size);
    if (!sized.length) return `no maps of this size in these layers`;
    const usable = sized.filter((layer) => chosen.head === "mean" || layer.heads.includes(chosen.head));
    if (!usable.length) return `no head ${chosen.head} in these layers`;
    return withTops(this.mean(column, usable, chosen.head));
  }

  /** Mean over layers and heads with equal weight per layer, at the largest size, as in `Recording.maps`. */
  mean(column, layers, head) {
    const groups = new Map();
    for (const layer of layers) {
      const { rows, columns } = layer, key = `${rows}x${columns}`, cells = rows * columns;
      if (!groups.has(key)) groups.set(key, { rows, columns, data: new Float32Array(this.steps * cells) });
      const { data } = groups.get(key), all = layer.heads.length;
      const heads = head === "mean" ? layer.heads.map((_, i) => i) : [layer.heads.indexOf(head)];
      for (let step = 0; step < this.steps; step++) {
        for (const one of heads) {
          const map = (step * all + one) * this.words + column;
          const scale = this.scales[layer.scales + map] / (255 * heads.length * layers.length);
          let from = layer.at + map * cells;
          for (let i = step * cells, end = i + cells; i < end; i++) data[i] += this.bytes[from++] * scale;
        }
      }
    }
    const [first, ...rest] = [...groups.values()].sort((a, b) => b.rows * b.columns - a.rows * a.columns);
    for (const other of rest) addResized(other, first, this.steps);
    return first;
  }

  /** Index of the entity whose region contains a point (in shares of the image); -1 for none. */
  entityAt(step, y, x) {
    const regions = this.run.regions;
    if (!regions) return -1;
    const row = Math.min(regions.rows - 1, Math.floor(y * regions.rows));
    const column = Math.min(regions.columns - 1, Math.floor(x * regions.columns));
    return this.bytes[regions.at + (step * regions.rows + row) * regions.columns + column] - 1;
  }

  /** Outlines of the regions at a step, one SVG path per entity, in units of the regions' locations. */
  regionPaths(step) {
    if (!this.run.regions) return [];
    if (!this.outlines.has(step)) {
      const { rows, columns, at } = this.run.regions;
      const owner = this.bytes.subarray(at + step * rows * columns, at + (step + 1) * rows * columns);
      this.outlines.set(step, this.run.entities.map((_, i) => outline(owner, rows, columns, i + 1)));
    }
    return this.outlines.get(step);
  }
}

/** Largest value per step and overall. */
function withTops(series) {
  const cells = series.rows * series.columns, steps = series.data.length / cells;
  const tops = new Float32Array(steps), peaks = new Uint32Array(steps);
  for (let step = 0; step < steps; step++) {
    for (let i = 0, from = step * cells; i < cells; i++) {
      if (series.data[from + i] > tops[step]) { tops[step] = series.data[from + i]; peaks[step] = i; }
    }
  }
  return { ...series, tops, peaks, top: tops.reduce((a, b) => Math.max(a, b), 0) };
}

/** Each map divided by its sum. */
function shares({ rows, columns, data }) {
  const cells = rows * columns, out = new Float32Array(data.length);
  for (let from = 0; from < data.length; from += cells) {
    let sum = 0;
    for (let i = from; i < from + cells; i++) sum += data[i];
    for (let i = from; sum > 0 && i < from + cells; i++) out[i] = data[i] / sum;
  }
  return out;
}

/** Add maps to larger ones after bilinear enlargement; locations are areas, so the interpolation is between centers. */
function addResized(small, large, steps) {
  const across = weights(small.columns, large.columns), down = weights(small.rows, large.rows);
  for (let step = 0, to = 0; step < steps; step++) {
    const base = step * small.rows * small.columns;
    for (let y = 0; y < large.rows; y++) {
      const upper = base + down.left[y] * small.columns, lower = base + down.right[y] * small.columns, v = down.share[y];
      for (let x = 0; x < large.columns; x++, to++) {
        const l = across.left[x], r = across.right[x], u = across.share[x];
        const above = small.data[upper + l] * (1 - u) + small.data[upper + r] * u;
        const below = small.data[lower + l] * (1 - u) + small.data[lower + r] * u;
        large.data[to] += above * (1 - v) + below * v;
      }
    }
  }
}

function weights(old, wanted) {
  const left = [], right = [], share = [];
  for (let i = 0; i < wanted; i++) {
    const center = Math.min(Math.max((i + 0.5) * (old / wanted) - 0.5, 0), old - 1);
    const first = Math.min(Math.floor(center), Math.max(old - 2, 0));
    left.push(first);
    right.push(Math.min(first + 1, old - 1));
    share.push(center - first);
  }
  return { left, right, share };
}

/** Edges of one region, drawn slightly inside so that the edges of adjacent regions are both visible. */
function outline(owner, rows, columns, which) {
  const inside = (y, x) => y >= 0 && x >= 0 && y < rows && x < columns && owner[y * columns + x] === which;
  const inset = 0.07, tidy = (value) => Number(value.toFixed(2));
  let path = "";
  const trace = (lines, length, before, after, draw) => {
    for (let line = 0; line <= lines; line++) {
      for (let i = 0, from = 0, side = 0; i <= length; i++) {
        const now = i < length ? after(line, i) - before(line, i) : 0; // 1: the region begins here, -1: it ends here
        if (now === side) continue;
        if (side) {
          const within = side > 0 ? after : before; // at inner corners lines go on, at outer ones they stop short
          const a = from + (within(line, from - 1) ? -inset : inset), b = i + (within(line, i) ? inset : -inset);
          path += draw(line + side * inset, a, b);
        }
        from = i;
        side = now;
      }
    }
  };
  trace(rows, columns, (y, x) => inside(y - 1, x), inside, (y, a, b) => `M${tidy(a)} ${tidy(y)}H${tidy(b)}`);
  trace(columns, rows, (x, y) => inside(y, x - 1), (x, y) => inside(y, x), (x, a, b) => `M${tidy(x)} ${tidy(a)}V${tidy(b)}`);
  return path;
}

/** A color map of 256 RGBA values for canvas pixels, interpolated from evenly spaced hex colors. */
function palette(hex) {
  const stops = hex.match(/../g).map((part) => parseInt(part, 16)), last = stops.length / 3 - 1;
  const pixels = new Uint8ClampedArray(256 * 4);
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * last, first = Math.min(Math.floor(at), last - 1), share = at - first;
    for (let c = 0; c < 3; c++) pixels[4 * i + c] = stops[3 * first + c] * (1 - share) + stops[3 * first + 3 + c] * share;
    pixels[4 * i + 3] = 255;
  }
  return new Uint32Array(pixels.buffer);
}

/** Paint one map at one pixel per location; the value `top` gets the last color. */
function paint(canvas, series, step, top, colors) {
  const { rows, columns, data } = series, cells = rows * columns;
  if (canvas.width !== columns || canvas.height !== rows || !canvas.image) {
    canvas.width = columns;
    canvas.height = rows;
    canvas.image = new ImageData(columns, rows);
    canvas.pixels = new Uint32Array(canvas.image.data.buffer);
  }
  const factor = top > 0 ? 255 / top : 0;
  for (let i = 0, from = step * cells; i < cells; i++) {
    canvas.pixels[i] = colors[Math.min(255, Math.round(data[from + i] * factor))];
  }
  canvas.getContext("2d").putImageData(canvas.image, 0, 0);
}

/** A number with two or three significant digits. */
function shortNumber(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 100) return value.toFixed(0);
  return size >= 0.001 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}
