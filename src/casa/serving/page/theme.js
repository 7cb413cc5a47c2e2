// Light, dark, or as the system has it; kept where the browser allows that.

import { at } from "./dom.js";

const THEMES = { "": "as the system has them", light: "light", dark: "dark" };

function kept() {
  try {
    const name = localStorage.getItem("theme") || "";
    return name in THEMES ? name : "";
  } catch {
    return ""; // storage is switched off
  }
}

function keep(name) {
  try {
    localStorage.setItem("theme", name);
  } catch {
    // then it lasts as long as the page
  }
}

/** Sets the page's colours and its button up. changed: called whenever they are others. */
export function themed(changed) {
  let now = kept();
  const wear = () => {
    if (now) document.documentElement.dataset.theme = now;
    else delete document.documentElement.dataset.theme;
    at("theme").title = `Colours: ${THEMES[now]}`;
    at("theme").setAttribute("aria-label", at("theme").title);
    changed();
  };
  at("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES);
    now = names[(names.indexOf(now) + 1) % names.length];
    keep(now);
    wear();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", wear);
  wear();
}
