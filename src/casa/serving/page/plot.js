// A live plot of two curves on a canvas: CASA whole, insertion dashed above it, so that both are seen where they are the
// same. Colours are the page's own.

const MOST_POINTS = 2000;
const LEFT = 62;
const BOTTOM = 20;
const TOP = 8;

export class Plot {
  /** canvas: its size is that of the page's layout. write: a value of the y axis as text. */
  constructor(canvas, write) {
    this.canvas = canvas;
    this.write = write;
    this.clear();
    new ResizeObserver(() => this.soon()).observe(canvas);
  }

  clear() {
    this.points = [];
    this.soon();
  }

  /** x: how many frames were watched. casa, insertion: values; insertion may be null. */
  add(x, casa, insertion) {
    this.points.push([x, casa, insertion]);
    if (this.points.length > MOST_POINTS) this.points = this.points.filter((_, index) => index % 2 === 0);
    this.soon();
  }

  soon() {
    if (this.waits) return;
    this.waits = true;
    requestAnimationFrame(() => {
      this.waits = false;
      this.draw();
    });
  }

  draw() {
    const { canvas, points } = this;
    const scale = window.devicePixelRatio || 1;
    const width = canvas.clientWidth;
    const height = canvas.clientHeight;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    const colours = getComputedStyle(canvas);
    const colour = (name) => colours.getPropertyValue(name).trim();
    const most = Math.max(...points.flatMap((point) => [point[1], point[2] ?? 0]), 0);
    const step = niceStep(most || 1, this.write.base);
    const top = step * Math.max(1, Math.ceil((most * 1.02) / step));
    const last = points.length ? points[points.length - 1][0] : 1;
    const first = points.length > 1 ? points[0][0] : Math.min(0, last - 1);
    const atX = (x) => LEFT + ((x - first) / Math.max(1, last - first)) * (width - LEFT - 6);
    const atY = (y) => height - BOTTOM - (y / top) * (height - BOTTOM - TOP);

    pen.font = `12px ${colours.fontFamily}`;
    pen.textBaseline = "middle";
    pen.lineWidth = 1;
    for (let value = 0; value <= top * 1.001; value += step) {
      pen.strokeStyle = colour("--line");
      pen.beginPath();
      pen.moveTo(LEFT, Math.round(atY(value)) + 0.5);
      pen.lineTo(width, Math.round(atY(value)) + 0.5);
      pen.stroke();
      pen.fillStyle = colour("--quiet");
      pen.textAlign = "right";
      if (points.length || value === 0) pen.fillText(points.length ? this.write(value) : "0", LEFT - 8, atY(value));
    }
    pen.textBaseline = "alphabetic";
    pen.fillText(points.length ? `frame ${last}` : "frames", width - 2, height - 4);
    if (points.length) {
      pen.textAlign = "left";
      pen.fillText(String(first), LEFT, height - 4);
    }
    this.curve(pen, points, 1, atX, atY, colour("--casa"), []);
    this.curve(pen, points, 2, atX, atY, colour("--insertion"), [5, 5]);
  }

  curve(pen, points, which, atX, atY, colour, dashes) {
    const drawn = points.filter((point) => point[which] !== null && point[which] !== undefined);
    if (!drawn.length) return;
    pen.strokeStyle = pen.fillStyle = colour;
    pen.lineWidth = 2;
    pen.lineJoin = "round";
    pen.setLineDash(dashes);
    pen.beginPath();
    for (const point of drawn) pen.lineTo(atX(point[0]), atY(point[which]));
    pen.stroke();
    pen.setLineDash([]);
    const end = drawn[drawn.length - 1];
    pen.beginPath();
    // a ring around a point
    pen.arc(Math.min(atX(end[0]), pen.canvas.clientWidth - 6), atY(end[which]), dashes.length ? 5 : 3, 0, 2 * Math.PI);
    if (dashes.length) pen.stroke();
    else pen.fill();
  }
}

/** About three steps up to `most`, each 1, 2 or 5 times a power of ten; of bytes, times a power of 1024. */
function niceStep(most, base = 10) {
  const unit = base === 1024 ? 1024 ** Math.floor(Math.log(Math.max(most / 3, 1)) / Math.log(1024)) : 1;
  const rough = most / unit / 3;
  const power = 10 ** Math.floor(Math.log10(rough));
  return unit * power * [1, 2, 5, 10].find((times) => times * power >= rough);
}

/** 1536 -> "1.5 KiB" */
export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (value >= 1024 && power < units.length - 1) {
    value /= 1024;
    power += 1;
  }
  return `${value < 10 && value % 1 ? value.toFixed(1) : Math.round(value)} ${units[power]}`;
}
bytes.base = 1024;

/** 0.0421 -> "42 ms" */
export function seconds(value) {
  if (value >= 1) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  const ms = value * 1000;
  return `${ms > 0 && ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
}
