// Training: rows in, a job, its loss as it goes, and what it learnt in the chat.

import { get, post, save, upload } from "./api.js";
import { curve } from "./curve.js";
import { drawnOf } from "./drawn.js";
import { announce, byId, bytes, duration, facts, follow, make, showError } from "./dom.js";
import { layersButton } from "./layers.js";
import { mergeOf } from "./merge.js";
import { MEANS, chosenMethod, offerMethod, rowView } from "./method.js";
import { chosenAdapter, showPlans, startPresets } from "./presets.js";
import { samplesOf } from "./samples.js";

const JOBS = "/v1/fine_tuning/jobs";
const number = (value) => (value == null ? null : value.toFixed(3));
const OFFERS = {
  running: ["Pause", "Stop"],
  queued: ["Pause", "Stop"],
  paused: ["Go on", "Stop"],
  failed: ["Go on"],
};
const FORMATS = [["native", "as Veneer's own"], ["peft", "for PEFT and vLLM"], ["gguf", "for llama.cpp (GGUF)"], ["mlx", "for MLX"]];
const ROUTES = { Pause: "pause", Stop: "cancel", "Go on": "resume" };
const MOST_WORDS = 12; // that are shown of those proposed
const STEPS_APART = 16; // between checkpoints, which can be asked; a few rows have their epochs' ends
let file = null; // the rows that are to be learnt
let isStarting = false; // a job, which a second press would start again
let shownRows = 0; // so that an answer that comes late shows nothing

const form = () => byId("train-form");
const isBase = () => byId("train-model").selectedIndex === 0;

function fault(text) {
  const place = byId("train-fault");
  place.textContent = text ?? "";
  place.hidden = !text;
}

function ready() {
  form().querySelector("button[type=submit]").disabled = !file;
}

// Propose tokens of their own for words that the model reads in many pieces.
function proposeWords(words) {
  const place = byId("train-words"), shown = words.slice(0, MOST_WORDS).join(", ");
  place.hidden = !words.length || !isBase();
  place.querySelector("input").checked = false;
  place.querySelector("span").textContent = `Give each word that the model reads in many pieces a token of its own: ${shown}${words.length > MOST_WORDS ? " …" : ""}`;
}

async function take(rows) {
  const mine = ++shownRows;
  fault(null);
  file = null;
  proposeWords([]);
  offerMethod("answers", []);
  ready();
  const place = byId("train-rows");
  place.replaceChildren(make("p", { class: "quiet" }, `Reading ${rows.name} …`));
  try {
    const sent = await upload(rows);
    const shown = await post("/api/rows", { file: sent.id, model: byId("train-model").value });
    if (mine !== shownRows) return;
    const why = offerMethod(shown.kind, shown.fields);
    if (!why) file = { ...sent, kind: shown.kind, meanTokens: shown.mean_tokens, newWords: shown.new_words };
    proposeWords(shown.new_words);
    const [one, means] = MEANS[shown.kind];
    const summary = `${sent.filename}: ${sent.rows.toLocaleString("en")} ${one}${sent.rows === 1 ? "" : "s"}. ${means}`;
    place.replaceChildren(make("p", {}, summary), make("ol", { class: "plain-list", tabindex: "0", "aria-label": "The first rows" }, ...shown.rows.map(rowView)));
    const faults = [...(why ? [why] : []), ...shown.faults];
    if (faults.length) fault(faults.join("\n"));
    announce(summary);
  } catch (error) {
    if (mine !== shownRows) return;
    place.replaceChildren();
    fault(error.message);
  }
  ready();
  showPlan().catch(showError);
}

// What the planner says of each preset, for the rows that are there; how long samples take, it knows not.
const showPlan = () => showPlans(file && file.kind !== "prompts" && { rows: file.rows, tokens: Math.round(file.rows * file.meanTokens) }, isBase());

async function start(event) {
  event.preventDefault();
  if (!file || isStarting) return;
  isStarting = true; // a disabled button would lose the focus
  fault(null);
  const { suffix, model, epochs } = form().elements;
  const body = { training_file: file.id, model: model.value, ...chosenMethod(file.kind, form().elements) };
  if (suffix.value.trim()) body.suffix = suffix.value.trim();
  if (isBase()) Object.assign(body, chosenAdapter());
  if (!byId("train-words").hidden && form().elements.new_words.checked) body.new_words = "auto";
  if (file.rows >= STEPS_APART) body.save_every = STEPS_APART;
  if (epochs.value) body.epochs = Number(epochs.value);
  try {
    const job = await post(JOBS, body);
    announce(`${job.run} waits for its turn.`);
    await showJobs();
    cards.get(job.id)?.querySelector("h4").focus();
  } catch (error) {
    fault(error.message);
  }
  isStarting = false;
}

const cards = new Map();

function jobCard(job, chat) {
  const title = make("h4", { tabindex: "-1" }, job.run);
  const card = make("article", { class: "card run", "aria-label": job.run }, title, make("p", { class: "state" }), make("p", { class: "fault" }), make("p", { class: "quiet now-text" }),
    make("progress", { "aria-label": `Steps of ${job.run}` }), make("div", { class: "now" }), make("div", { class: "picture" }), make("p", { class: "acts" }));
  card.samples = samplesOf(JOBS, job);
  card.append(card.samples.details);
  card.drawn = job.method.type === "reinforcement" ? drawnOf(job) : null;
  if (card.drawn) card.append(card.drawn.details);
  card.chat = chat;
  return card;
}

function act(job, text) {
  const button = make("button", { type: "button", class: "plain small", "aria-label": `${text} ${job.run}` }, text);
  let asked = false; // a disabled button would lose the focus
  button.addEventListener("click", async () => {
    if (asked) return;
    asked = true;
    try {
      await post(`${JOBS}/${job.id}/${ROUTES[text]}`, {});
      await showJobs();
    } catch (error) {
      showError(error);
    }
    asked = false;
  });
  return button;
}

// A choice of formats; choosing one saves the adapter in it.
function download(job) {
  const select = make("select", { class: "small", "aria-label": `Download ${job.run}` }, make("option", { value: "" }, "Download …"),
    ...FORMATS.map(([value, text]) => make("option", { value }, text)));
  select.addEventListener("change", async () => {
    const format = select.value;
    select.value = "";
    if (!format) return;
    try {
      await save(`/api/jobs/${job.id}/adapter?format=${format}`, `${job.run}-${format}.zip`);
      announce(`${job.run} is saved as ${format}.`);
    } catch (error) {
      showError(error);
    }
  });
  return select;
}

function fill(card, job, run, message) {
  const before = card.dataset.state;
  card.dataset.state = job.status;
  card.querySelector(".state").textContent = job.status;
  card.querySelector(".fault").textContent = job.error?.message ?? "";
  card.querySelector(".fault").hidden = !job.error;
  const now = card.querySelector(".now-text");
  now.textContent = message ?? "";
  now.hidden = !message || Boolean(job.error);
  const progress = card.querySelector("progress");
  progress.hidden = job.steps == null;
  if (job.steps != null) Object.assign(progress, { max: job.steps, value: job.step });
  const left = job.estimated_finish == null ? null : duration(Math.max(0, job.estimated_finish - Date.now() / 1000));
  card.querySelector(".now").replaceChildren(facts([
    ["Step", job.steps == null ? null : `${job.step} of ${job.steps}`],
    ["Loss", number(run?.loss)],
    ["Mean reward", number(run?.reward)],
    ["Evaluation loss", number(run?.evaluations.at(-1)?.[1])],
    ["Time left", left],
    ["Starts from", job.model],
  ]));
  card.querySelector(".picture").replaceChildren(...(run?.curve.length ? [curve(run.curve, run.evaluations, job.steps)] : []));
  if (before === job.status) return;
  const acts = card.querySelector(".acts");
  const hadFocus = acts.contains(document.activeElement);
  acts.replaceChildren(...(OFFERS[job.status] ?? []).map((text) => act(job, text)));
  if (job.fine_tuned_model) {
    const ask = make("button", { type: "button", class: "small", "aria-label": `Chat with ${job.run}` }, "Chat with it");
    ask.addEventListener("click", () => card.chat(job.fine_tuned_model));
    card.append(mergeOf(job.fine_tuned_model));
    acts.append(ask, layersButton(card, job.fine_tuned_model), download(job));
  }
  if (hadFocus) (acts.querySelector("button") ?? card.querySelector("h4")).focus();
  if (before) announce(`${job.run}: ${job.status}`);
}

let chatWith = () => {};

// What the view shows when it is opened.
export async function openTraining() {
  await showJobs();
  await showPlan();
}

let looks = 0, newest = 0; // so that a look that another one overtook shows nothing

async function showJobs() {
  const mine = ++looks;
  const [{ data }, { runs }] = await Promise.all([get(`${JOBS}?limit=50`), get("/api/runs")]);
  if (mine < newest) return;
  newest = mine;
  const container = byId("jobs");
  byId("jobs-none").hidden = data.length > 0;
  for (const job of data.reverse()) { // the newest comes first on the page
    if (!cards.has(job.id)) {
      cards.set(job.id, jobCard(job, (name) => chatWith(name)));
      container.prepend(cards.get(job.id));
    }
    const card = cards.get(job.id);
    card.samples.follow(job);
    card.drawn?.follow();
  }
  for (const job of data) {
    const card = cards.get(job.id), run = runs.find((each) => each.name === job.run);
    // A worker that is asked to stop ends its step first.
    const seen = JSON.stringify([job.status, job.step, run?.step, run?.evaluations.length]);
    if (card.dataset.seen === seen && !["running", "queued"].includes(job.status)) continue;
    const events = await get(`${JOBS}/${job.id}/events?limit=1`);
    if (mine !== newest) return;
    fill(card, job, run, events.data[0]?.message);
    card.dataset.seen = seen;
  }
}

// Offer the base and the adapters to start from, keeping what was chosen.
export function offerBases({ base, adapters, training }) {
  byId("train-off").hidden = training;
  byId("train-on").hidden = !training;
  const select = byId("train-model"), before = select.value;
  const names = [base.name, ...adapters.filter((each) => !each.error).map((each) => each.name)];
  select.replaceChildren(...names.map((name, i) => make("option", { value: name }, i ? name : `${name} (base)`)));
  select.value = names.includes(before) ? before : base.name;
  ready();
}

export function startTraining(isShown, chat) {
  chatWith = chat;
  form().addEventListener("submit", start);
  byId("train-model").addEventListener("change", () => {
    proposeWords(file?.newWords ?? []);
    showPlan().catch(showError);
  });
  startPresets(showPlan);
  byId("train-file").addEventListener("change", ({ target }) => target.files[0] && take(target.files[0]));
  byId("train-paste").addEventListener("click", () => {
    const text = byId("train-text").value;
    if (text.trim()) take(new File([text], "pasted.jsonl"));
  });
  const drop = byId("drop");
  for (const name of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      if (name === "drop" && event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
    });
  }
  follow(isShown, showJobs);
}
