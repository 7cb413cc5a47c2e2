// The live page: shows a film or a camera, sends its frames to the server, and shows what comes back.

import { at, isBad, slow, status, trouble } from "./dom.js";
import { grab, isPlaying, place, sources, video } from "./source.js";
import { themed } from "./theme.js";
import { answered, clear, explain, redraw, said, used } from "./view.js";

const SLOW_BYTES = 1 << 20; // waiting in the socket: the line is slower than the frames
const MOST_SENT = 200; // frames whose time of sending is remembered

const token = new URLSearchParams(location.hash.slice(1)).get("token") || "";
let stream = null; // the socket's state: see `open`
let told = ""; // the name of the stream whose captions are on the page, also once it has ended
let about = { fps: 2 };

function enable() {
  const live = stream !== null && stream.ready;
  for (const id of ["pause", "question", "send"]) at(id).disabled = !live;
  at("pause").textContent = live && stream.paused ? "Go on" : "Pause";
  for (const button of document.querySelectorAll(".download")) button.disabled = !told;
}

// ---- stream ----------------------------------------------------------------------------------------------------

function open() {
  const address = new URL("v1/streams", location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  address.hash = "";
  const socket = new WebSocket(address);
  const mine = { socket, ready: false, paused: false, sent: new Map(), lost: 0, timer: 0, last: -1 };
  mine.fps = Math.max(0.1, Number(at("fps").value) || about.fps);
  mine.begun = performance.now();
  stream = mine;
  status("idle", "connecting");
  clear();
  told = "";
  enable();
  socket.addEventListener("open", () => {
    const hello = { type: "hello", fps: mine.fps };
    if (at("prompt").value.trim()) hello.prompt = at("prompt").value.trim();
    if (Number(at("bound").value)) hello.max_text_tokens = Math.round(Number(at("bound").value));
    if (token) hello.token = token;
    socket.send(JSON.stringify(hello));
  });
  socket.addEventListener("message", (message) => {
    if (stream === mine) heard(mine, JSON.parse(message.data));
  });
  socket.addEventListener("close", (event) => {
    clearInterval(mine.timer);
    mine.ready = false;
    if (stream !== mine) return;
    video.pause();
    if (!isBad()) status("bad", event.code === 1000 ? "ended" : "connection lost");
    enable();
  });
}

function close() {
  if (!stream) return;
  const old = stream;
  stream = null;
  clearInterval(old.timer);
  old.socket.close();
  enable();
}

function begin(mine, event) {
  mine.ready = true;
  told = event.stream;
  mine.begun = performance.now();
  explain(event.insertion);
  slow(event.advice);
  status("live", "live");
  enable();
  video.play();
  mine.timer = setInterval(() => send(mine), 1000 / mine.fps);
  send(mine);
}

function send(mine) {
  const { socket } = mine;
  if (stream !== mine || !mine.ready || mine.paused || !isPlaying()) return;
  const now = place(mine.begun);
  if (now === mine.last) return;
  mine.last = now;
  if (socket.bufferedAmount > SLOW_BYTES) {
    mine.lost += 1;
    return;
  }
  const start = performance.now();
  grab(Number(at("side").value) || 448, (blob) => {
    if (socket.readyState !== WebSocket.OPEN) return;
    const time = Number(now.toFixed(3));
    mine.sent.set(time, start);
    if (mine.sent.size > MOST_SENT) mine.sent.delete(mine.sent.keys().next().value);
    socket.send(JSON.stringify({ type: "frame", time }));
    socket.send(blob);
  });
}

function heard(mine, event) {
  if (event.type === "ready") begin(mine, event);
  else if (event.type === "caption") said(event);
  else if (event.type === "usage") {
    const start = mine.sent.get(event.time);
    mine.sent.delete(event.time);
    used(event, start === undefined ? event.lag : (performance.now() - start) / 1000, event.dropped + mine.lost);
  } else if (event.type === "answer") answered(event);
  else if (event.type === "dropped") at("dropped").textContent = String(event.count + mine.lost);
  else if (event.type === "paused" || event.type === "resumed") {
    status(event.type === "paused" ? "paused" : "live", event.type === "paused" ? "paused" : "live");
  } else if (event.type === "error") {
    trouble(event.message);
    if (event.fatal) status("bad", "ended");
  }
}

// ---- controls --------------------------------------------------------------------------------------------------

function pause(paused) {
  if (!stream || !stream.ready || stream.paused === paused) return;
  stream.paused = paused;
  stream.socket.send(JSON.stringify({ type: paused ? "pause" : "resume" }));
  if (paused) video.pause();
  else video.play();
  enable();
}

at("pause").addEventListener("click", () => pause(!stream.paused));
// the player's own buttons do the same
video.addEventListener("pause", () => {
  if (!video.ended) pause(true);
});
video.addEventListener("play", () => {
  pause(false);
  if (stream && stream.ready) status("live", "live");
});
video.addEventListener("ended", () => {
  if (stream && stream.ready) status("paused", "film ended");
});

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value.trim() || at("question").placeholder;
  if (!stream || !stream.ready) return;
  trouble("");
  stream.socket.send(JSON.stringify({ type: "ask", question }));
  at("question").value = "";
});

for (const button of document.querySelectorAll(".download")) {
  button.addEventListener("click", async () => {
    const kind = button.dataset.kind;
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    const answer = await fetch(`v1/streams/${told}/captions.${kind}`, { headers }).catch(() => null);
    if (!answer || !answer.ok) {
      trouble("The captions of this stream are no longer there.");
      return;
    }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = `captions.${kind}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  });
}

themed(redraw);
sources(close, open);
addEventListener("hashchange", () => location.reload()); // the token may be another
about = await (await fetch("about.json")).json();
at("model").textContent = about.model;
at("fps").value = about.fps;
at("fps").max = about.max_fps;
at("bound").value = about.text_tokens || "";
at("bound").max = about.max_text_tokens;
at("bound").disabled = !about.text_tokens; // the model cannot forget
at("prompt").placeholder = about.prompt;
if (about.needs_token && !token) trouble("This server asks for a token: open its address with #token=... at the end.");
