// What every part of the page uses: its elements, its two lines of news, and times as text.

export const at = (id) => document.getElementById(id);

/** The pill at the top. state: "idle", "live", "paused" or "bad". */
export function status(state, text) {
  at("status").dataset.state = state;
  at("status").textContent = text;
}

export const isBad = () => at("status").dataset.state === "bad";

/** What went wrong, in a sentence; nothing hides it. */
export function trouble(text) {
  at("trouble").textContent = text || "";
  at("trouble").hidden = !text;
}

/** What the server says of a machine that is too slow; nothing once all is well. */
export function slow(text) {
  at("slow").textContent = text || "";
  at("slow").hidden = !text;
}

/** 3725.04 -> "1:02:05.0" */
export function clock(value) {
  const tenths = Math.floor(value * 10 + 1e-6);
  const whole = Math.floor(tenths / 10);
  const parts = [Math.floor(whole / 60) % 60, whole % 60].map((part) => String(part).padStart(2, "0"));
  return `${whole >= 3600 ? `${Math.floor(whole / 3600)}:` : ""}${parts.join(":")}.${tenths % 10}`;
}
