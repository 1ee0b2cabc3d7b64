// Waiting times of the last texts: a picture, and the same in words.

const SVG = "http://www.w3.org/2000/svg";
const MOST_EVENTS = 120; // of the latest, in the picture
const HEIGHT = 150;
const EDGE = { left: 56, right: 8, top: 10, bottom: 8 };

function shape(tag, attributes, text = "") {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

/** The value below which a part of them lies. */
function quantile(values, part) {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.min(Math.floor(part * sorted.length), sorted.length - 1)];
}

/** The smallest of 1, 2, 5 times a power of ten that is at least `value`. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => step * power >= value);
}

const inUnits = (ms) => (ms < 1000 ? `${ms} ms` : `${ms / 1000} s`);

export class LatencyPlot {
  #place;
  #summary;
  #events = []; // { kind: "partial" | "final", ms }

  /** @param {HTMLElement} place @param {HTMLElement} summary */
  constructor(place, summary) {
    [this.#place, this.#summary] = [place, summary];
    new ResizeObserver(() => this.#draw()).observe(place);
  }

  add(kind, ms) {
    this.#events.push({ kind, ms: Math.max(ms, 0) });
    this.#draw();
  }

  clear() {
    this.#events = [];
    this.#draw();
  }

  #draw() {
    this.#summary.replaceChildren(...["partial", "final"].map((kind) => this.#inWords(kind)).filter(Boolean));
    const shown = this.#events.slice(-MOST_EVENTS);
    const width = Math.max(this.#place.clientWidth, 120);
    const top = roundUp(Math.max(...shown.map(({ ms }) => ms), 10));
    const y = (ms) => HEIGHT - EDGE.bottom - (ms / top) * (HEIGHT - EDGE.top - EDGE.bottom);
    const step = (width - EDGE.left - EDGE.right) / Math.max(shown.length, 24);
    const picture = shape("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img" });
    picture.setAttribute("aria-label", `Latency of the last ${shown.length} texts, in milliseconds; its numbers are below`);
    for (const tick of [0, top / 2, top]) {
      picture.append(shape("line", { x1: EDGE.left, x2: width - EDGE.right, y1: y(tick), y2: y(tick), class: "grid" }));
      picture.append(shape("text", { x: EDGE.left - 6, y: y(tick) + 4, class: "tick" }, inUnits(tick)));
    }
    shown.forEach(({ kind, ms }, i) => {
      const x = EDGE.left + (i + 0.5) * step;
      const r = Math.min(3.2, 0.3 + step / 2);
      picture.append(shape("line", { x1: x, x2: x, y1: y(0), y2: y(ms), class: `stem ${kind}` }));
      if (kind === "partial") picture.append(shape("circle", { cx: x, cy: y(ms), r, class: kind }));
      else
        picture.append(
          shape("path", {
            d: `M${x} ${y(ms) - r - 1.5}l${r + 1.5} ${r + 1.5}l${-r - 1.5} ${r + 1.5}l${-r - 1.5} ${-r - 1.5}z`,
            class: kind,
          }),
        );
    });
    this.#place.replaceChildren(picture);
  }

  #inWords(kind) {
    const values = this.#events.filter((event) => event.kind === kind).map(({ ms }) => ms);
    if (values.length === 0) return null;
    const [half, most] = [0.5, 0.95].map((part) => Math.round(quantile(values, part)));
    const item = document.createElement("li");
    item.className = kind;
    item.textContent = `${values.length} ${kind}${values.length > 1 ? "s" : ""}: median ${half}, p95 ${most} ms`;
    return item;
  }
}
