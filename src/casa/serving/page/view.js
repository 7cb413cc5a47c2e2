// What a stream's events look like: captions, answers, figures and the two plots.

import { at, clock, slow } from "./dom.js";
import { Plot, bytes, seconds } from "./plot.js";

const MEDIAN = 9; // frames over which times are levelled
const MOST_LINES = 500;
const MOST_ANSWERS = 50;
const HOLD_MS = 3000; // a caption is at full strength for so long

const memory = new Plot(at("memory"), bytes);
const time = new Plot(at("time"), seconds);
let times = []; // of the last frames: [CASA, insertion or null]
let fading = 0;

/** Draws the plots again, in the colours that hold now. */
export function redraw() {
  memory.soon();
  time.soon();
}

/** As it is before the first frame. */
export function clear() {
  memory.clear();
  time.clear();
  times = [];
  at("log").replaceChildren();
  at("answers").replaceChildren();
  at("caption").textContent = "";
  slow("");
  for (const id of ["lag", "latency", "casa-bytes", "casa-time", "insertion-bytes", "insertion-time"]) {
    at(id).textContent = "–";
  }
  at("frames").textContent = at("dropped").textContent = "0";
}

/** How insertion's figures are known. insertion: what `ready` says of it. */
export function explain(insertion) {
  const bytesKnown =
    "Its memory is computed: the keys and values of all tokens so far, for the same frames and captions with this " +
    "model's weights.";
  const timeKnown =
    "Its time is this frame's own, plus what attending to the tokens kept so far adds, as measured on this machine " +
    `when the server started. Times are medians of ${MEDIAN} frames.`;
  at("how").textContent = !insertion
    ? "This model is the insertion baseline itself."
    : insertion.latency === null
      ? bytesKnown
      : `${bytesKnown} ${timeKnown}`;
}

/** A caption: under the picture, and in the list of all. */
export function said(event) {
  const words = event.complete ? event.text : `${event.text} …`;
  at("caption").textContent = words;
  at("caption").classList.remove("old");
  clearTimeout(fading);
  fading = setTimeout(() => at("caption").classList.add("old"), HOLD_MS);
  const log = at("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  const line = document.createElement("li");
  line.append(element("time", clock(event.time)), element("span", words));
  log.append(line);
  if (log.children.length > MOST_LINES) log.firstChild.remove();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

/** A frame's figures. lag: in seconds. dropped: frames lost so far, here and there. */
export function used(event, lag, dropped) {
  slow(event.advice);
  at("lag").textContent = seconds(lag);
  at("frames").textContent = String(event.watched);
  at("dropped").textContent = String(dropped);
  const { insertion } = event;
  times.push([event.latency, insertion ? insertion.latency : null]);
  if (times.length > MEDIAN) times.shift();
  const casaTime = median(times.map((pair) => pair[0]));
  const theirs = times.map((pair) => pair[1]).filter((value) => value !== null);
  const insertionTime = theirs.length ? median(theirs) : null;
  memory.add(event.watched, event.cache_bytes, insertion ? insertion.cache_bytes : null);
  time.add(event.watched, casaTime, insertionTime);
  at("latency").textContent = at("casa-time").textContent = seconds(casaTime);
  at("casa-bytes").textContent = bytes(event.cache_bytes);
  at("insertion-bytes").textContent = insertion ? bytes(insertion.cache_bytes) : "–";
  at("insertion-time").textContent = insertionTime === null ? "–" : seconds(insertionTime);
}

/** A question and its answer, the newest on top. */
export function answered(event) {
  const line = document.createElement("li");
  line.append(element("q", `${clock(event.time)}  ${event.question}`), element("span", event.text || "(nothing)"));
  at("answers").prepend(line);
  if (at("answers").children.length > MOST_ANSWERS) at("answers").lastChild.remove();
  at("answers").scrollTop = 0;
}

function element(kind, text) {
  const made = document.createElement(kind);
  made.textContent = text;
  return made;
}

const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];
