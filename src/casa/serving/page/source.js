// What is watched: a file, the webcam or the sample film, played on the page and grabbed frame by frame.

import { at, status, trouble } from "./dom.js";

export const video = at("video");
const canvas = document.createElement("canvas"); // frames are scaled here

let source = null; // {kind: "file" | "camera" | "film", url, media}

/** Lets the user choose. leaving: called before the old source goes; chosen: once the new one can play. */
export function sources(leaving, chosen) {
  async function show(kind, given) {
    leaving();
    trouble("");
    drop();
    const mine = { kind, url: kind === "file" ? URL.createObjectURL(given) : "", media: kind === "camera" ? given : null };
    source = mine;
    video.srcObject = mine.media;
    if (!mine.media) video.src = mine.url || given;
    video.controls = kind !== "camera";
    at("welcome").hidden = true;
    try {
      await video.play();
      if (source !== mine) return; // another one was chosen meanwhile
      video.pause(); // until the server is ready, so that nothing is missed
      if (kind !== "camera") video.currentTime = 0;
      chosen();
    } catch {
      if (source !== mine) return;
      status("bad", "cannot play");
      trouble("This browser cannot play that video. MP4 with H.264 and WebM play nearly everywhere.");
    }
  }

  at("pick").addEventListener("click", () => at("file").click());
  at("file").addEventListener("change", () => {
    const [file] = at("file").files;
    if (file) show("file", file);
    at("file").value = "";
  });
  at("film").addEventListener("click", () => show("film", "film.mp4"));
  at("camera").addEventListener("click", async () => {
    try {
      show("camera", await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 } }, audio: false }));
    } catch {
      trouble("There is no camera that this page may use. Browsers allow it on localhost and over https only.");
    }
  });
  // a file let fall anywhere on the page
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file) show("file", file);
  });
}

function drop() {
  if (!source) return;
  if (source.media) for (const track of source.media.getTracks()) track.stop();
  if (source.url) URL.revokeObjectURL(source.url);
}

/** Whether there is a picture that moves. */
export const isPlaying = () => !video.paused && !video.ended && video.readyState >= 2;

/** Seconds into the video; of a camera, since `begun`. */
export const place = (begun) => (source.kind === "camera" ? (performance.now() - begun) / 1000 : video.currentTime);

/** Hands the picture at hand, as a JPEG of at most `side` pixels, to `use`. */
export function grab(side, use) {
  const scale = Math.min(1, side / Math.max(video.videoWidth, video.videoHeight));
  canvas.width = Math.max(1, Math.round(video.videoWidth * scale));
  canvas.height = Math.max(1, Math.round(video.videoHeight * scale));
  canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
  canvas.toBlob((blob) => blob && use(blob), "image/jpeg", 0.9);
}
