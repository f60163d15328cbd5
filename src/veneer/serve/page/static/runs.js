// Training runs as they go, and two of them side by side.

import { get } from "./api.js";
import { curve, curves } from "./curve.js";
import { announce, byId, duration, facts, make, showError } from "./dom.js";

const number = (value) => (value == null ? null : value.toFixed(3));
const speed = (run) => (run.tokens_per_second == null ? null : `${Math.round(run.tokens_per_second).toLocaleString("en")} tokens/s`);
const evaluation = (run) => (run.evaluations.length ? Math.min(...run.evaluations.map(([, loss]) => loss)) : null);
// Files by what they are called, and where they lie only where that is all that tells them apart.
const fileNames = (paths) => {
  const names = paths.map((path) => path?.split("/").at(-1));
  return new Set(names).size < names.length ? paths.map((path) => path?.split("/").slice(-2).join("/")) : names;
};
const cards = new Map();
let chosen = []; // the names of at most two runs that are compared
let shown = ""; // the two of which the differences are on the screen

function runCard(name) {
  const box = make("input", { type: "checkbox", "aria-label": `Compare ${name}` });
  box.addEventListener("change", () => choose(name, box.checked));
  const card = make("article", { class: "card run" }, make("h3", {}, name));
  card.append(make("p", { class: "state" }), make("p", { class: "fault" }), make("p", { class: "verdict" }), make("progress", { "aria-label": `Steps of ${name}` }),
    make("div", { class: "now" }), make("div", { class: "picture" }), make("label", { class: "choose" }, box, "Compare"));
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
    ["Speed", speed(run)],
    ["Time left", run.seconds_left == null ? null : duration(run.seconds_left)],
    ["Model", model],
    ["Trained on", data?.split("/").at(-1)],
  ]));
  card.querySelector(".picture").replaceChildren(curve(run.curve, run.evaluations, run.steps));
}

// Take a run into the comparison; a third one takes the place of the first.
function choose(name, is) {
  chosen = [...chosen.filter((each) => each !== name), ...(is ? [name] : [])].slice(-2);
  for (const [each, card] of cards) card.querySelector(".choose input").checked = chosen.includes(each);
  if (chosen.length === 1) announce(`${chosen[0]} is chosen; choose another run to compare it with.`);
  showRuns().catch(showError);
}

function table(names, rows, caption) {
  const head = make("tr", {}, make("td"), ...names.map((name) => make("th", { scope: "col" }, name)));
  const body = rows.map(([title, values]) => make("tr", {}, make("th", { scope: "row" }, title), ...values.map((value) => make("td", {}, value ?? "–"))));
  return make("table", { class: "versus" }, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...body));
}

async function showCompared(runs) {
  const place = byId("runs-compared");
  const two = chosen.map((name) => runs.find((run) => run.name === name)).filter(Boolean);
  place.hidden = two.length < 2;
  if (place.hidden) {
    shown = "";
    return;
  }
  const names = two.map((run) => run.name);
  const key = make("p", { class: "quiet legend" }, ...names.map((name, i) => make("span", { class: `of${i}` }, name)));
  byId("runs-curves").replaceChildren(curves(two), key);
  byId("runs-results").replaceChildren(table(names, [
    ["State", two.map((run) => run.state)],
    ["Steps", two.map((run) => (run.steps == null ? run.step : `${run.step} of ${run.steps}`))],
    ["Last loss", two.map((run) => number(run.loss))],
    ["Best evaluation loss", two.map((run) => number(evaluation(run)))],
    ["Speed", two.map(speed)],
  ], "What became of them"));
  const both = names.join("\n");
  if (shown === both) return;
  shown = both;
  const asked = new URLSearchParams(names.map((name) => ["run", name]));
  const { differences } = await get(`/api/runs/differences?${asked}`).catch((error) => {
    if (shown === both) shown = ""; // the next look asks again
    throw error;
  });
  if (shown !== both) return; // another choice came meanwhile
  const rows = differences.map(({ setting, values }) => [setting.replaceAll("_", " "), setting === "data" ? fileNames(values) : values]);
  byId("runs-settings").replaceChildren(rows.length ? table(names, rows, "Settings in which they differ") : make("p", { class: "quiet" }, "Their settings are the same."));
  announce(`${names.join(" and ")} are compared: ${rows.length} settings differ.`);
}

export async function showRuns() {
  const { enabled, runs } = await get("/api/runs");
  const container = byId("runs");
  chosen = chosen.filter((name) => runs.some((run) => run.name === name));
  if (!runs.length) {
    cards.clear();
    container.replaceChildren(make("p", { class: "quiet" }, enabled ? "No run has written anything yet." : "Start with --runs DIRECTORY to see runs of veneer tune as they go."));
    await showCompared(runs);
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
  await showCompared(runs);
}
