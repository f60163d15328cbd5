// Sampling settings: one form in each view that asks, all of them the same settings.

import { byId } from "./dom.js";

export function addSettings() {
  const template = byId("settings");
  for (const holder of document.querySelectorAll("[data-settings]")) {
    holder.append(template.content.cloneNode(true));
    holder.addEventListener("input", ({ target }) => {
      for (const other of document.querySelectorAll(`[data-settings] [name="${target.name}"]`)) {
        if (other !== target) other.value = target.value;
      }
    });
    if (window.matchMedia("(max-width: 56rem)").matches) holder.querySelector("details").open = false;
  }
}

// Let the longest answer leave room for a question where the context is small.
export function fitSettings(context) {
  if (!context) return;
  for (const input of document.querySelectorAll('[data-settings] [name="max_tokens"]')) {
    if (input.value === input.defaultValue) input.value = Math.min(Number(input.defaultValue), Math.floor(context / 2));
  }
}

// Propose the system prompt that an adapter was trained with, where none was written by hand.
let proposed = "";
export function propose(system) {
  for (const area of document.querySelectorAll('[data-settings] [name="system"]')) {
    if (area.value.trim() === proposed) area.value = system;
  }
  proposed = system.trim();
}

const value = (name) => document.querySelector(`[data-settings] [name="${name}"]`).value.trim();

export function sampling() {
  const settings = {};
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if (value(name) !== "") settings[name] = Number(value(name));
  }
  return settings;
}

export function instructions() {
  return value("system") ? [{ role: "system", content: value("system") }] : [];
}
