// Adapters and training runs, as cards.

import { get } from "./api.js";
import { curve } from "./curve.js";
import { byId, bytes, duration, facts, make, showError } from "./dom.js";

const number = (value, digits = 3) => (value == null ? null : value.toFixed(digits));

export function method(adapter) {
  if (adapter.method) return adapter.method;
  return adapter.dora ? "DoRA" : "LoRA";
}

const list = (value) => (Array.isArray(value) ? value.join(", ") : value);

export function showAdapters({ base, adapters }) {
  const container = byId("adapters");
  container.replaceChildren();
  if (!adapters.length) container.append(make("p", { class: "quiet" }, `None yet: ${base.name} is served as it is. Start with --adapter name=directory, or --adapters-dir.`));
  for (const adapter of adapters) {
    const trained = adapter.trained ?? {};
    const card = make("article", { class: adapter.error ? "card refused" : "card" }, make("h3", {}, adapter.name));
    if (adapter.resident) card.append(make("p", { class: "state" }, "in memory"));
    if (adapter.note) card.append(make("p", { class: "quiet" }, adapter.note));
    if (adapter.error) card.append(make("p", { class: "fault" }, adapter.error));
    card.append(facts([
      ["Method", adapter.error ? null : method(adapter)],
      ["Rank", adapter.rank],
      ["Alpha", adapter.alpha],
      ["Targets", list(adapter.targets)],
      ["Layers", adapter.layers],
      ["Virtual tokens", adapter.virtual_tokens],
      ["Size", bytes(adapter.bytes)],
      ["Made for", adapter.base],
      ["Trained over", adapter.over],
      ["System prompt", adapter.system],
      ["Trained on", trained.data],
      ["Steps", trained.steps],
      ["Last loss", number(adapter.loss)],
      ["Evaluation loss", number(adapter.eval_loss)],
    ]));
    if (adapter.curve) card.append(curve(adapter.curve, adapter.evaluations));
    container.append(card);
  }
}

function runCard(name) {
  const card = make("article", { class: "card run" }, make("h3", {}, name));
  card.append(make("p", { class: "state" }), make("p", { class: "fault" }), make("p", { class: "verdict" }), make("progress", { "aria-label": `Steps of ${name}` }), make("div", { class: "now" }), make("div", { class: "picture" }));
  return card;
}

function fill(card, run) {
  card.querySelector(".state").textContent = run.state;
  card.dataset.state = run.state;
  for (const [place, text] of [[".fault", run.why], [".verdict", run.verdict]]) {
    card.querySelector(place).hidden = !text;
    card.querySelector(place).textContent = text ?? "";
  }
  const progress = card.querySelector("progress");
  progress.hidden = run.steps == null;
  if (run.steps != null) {
    progress.max = run.steps;
    progress.value = run.step;
  }
  const { model, data } = run.settings;
  card.querySelector(".now").replaceChildren(facts([
    ["Step", run.steps == null ? run.step : `${run.step} of ${run.steps}`],
    ["Loss", number(run.loss)],
    ["Evaluation loss", number(run.evaluations.at(-1)?.[1])],
    ["Speed", run.tokens_per_second == null ? null : `${Math.round(run.tokens_per_second).toLocaleString("en")} tokens/s`],
    ["Time left", run.seconds_left == null ? null : duration(run.seconds_left)],
    ["Model", model],
    ["Trained on", data],
  ]));
  card.querySelector(".picture").replaceChildren(curve(run.curve, run.evaluations, run.steps));
}

const cards = new Map();

export async function showRuns() {
  const { enabled, runs } = await get("/api/runs");
  const container = byId("runs");
  if (!runs.length) {
    cards.clear();
    container.replaceChildren(make("p", { class: "quiet" }, enabled ? "No run has written anything yet." : "Start with --runs DIRECTORY to see runs of veneer tune as they go."));
    return;
  }
  if (!cards.size) container.replaceChildren();
  for (const run of runs) {
    if (!cards.has(run.name)) {
      cards.set(run.name, runCard(run.name));
      container.append(cards.get(run.name));
    }
    fill(cards.get(run.name), run);
  }
  for (const [name, card] of cards) {
    if (!runs.some((run) => run.name === name)) {
      card.remove();
      cards.delete(name);
    }
  }
}

// Look again every second while the view is on the screen.
export function followRuns(isShown) {
  const look = async () => {
    if (isShown() && !document.hidden) {
      try {
        await showRuns();
      } catch (error) {
        showError(error);
      }
    }
    setTimeout(look, 1000);
  };
  look();
}
