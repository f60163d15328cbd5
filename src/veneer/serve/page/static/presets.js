// How much a job learns: presets, each with the planner's word on memory, time, and whether it fits.

import { post } from "./api.js";
import { byId, bytes, duration, showError } from "./dom.js";

const PAUSE = 300; // milliseconds without a change
const form = () => byId("train-form");
const boxes = () => [...form().querySelectorAll("input[name=preset]")];
const inWords = (n) => (n < 1e6 ? n.toLocaleString("en") : `${(n / 1e6).toFixed(n < 1e7 ? 1 : 0)} million`);

// Seconds below a minute by tens, and else by minutes: nobody knows them better.
const roughly = (seconds) => (seconds < 60 ? Math.max(10, 10 * Math.round(seconds / 10)) : 60 * Math.round(seconds / 60));

// Return {rank, targets} of a preset.
function adapterOf(box) {
  const { rank, targets } = form().elements;
  if (box.value === "own") return { rank: Number(rank.value), targets: targets.value };
  const [size, layers] = box.value.split(" ");
  return { rank: Number(size), targets: layers };
}

export const chosenAdapter = () => adapterOf(boxes().find((box) => box.checked));

function sentence({ parameters, memory, free, passes, seconds, why }) {
  if (why) return why;
  const words = [`${inWords(parameters)} numbers train, in at most ${bytes(memory)}`];
  if (free != null && memory > free) words[0] = `Does not fit: needs up to ${bytes(memory)}, and ${bytes(free)} are free`;
  else if (free != null) words[0] += ` of the ${bytes(free)} that are free`;
  if (passes) words.push(`${passes} ${passes === 1 ? "pass" : "passes"} over the rows${seconds == null ? "" : `, about ${duration(roughly(seconds))}`}`);
  return `${words.join("; ")}.`;
}

let asked = 0; // so that an answer that comes late shows nothing

// Ask the planner for each preset. rows: {rows, tokens} of the file, or nothing yet.
export async function showPlans(rows, isBase) {
  const mine = ++asked, { epochs } = form().elements;
  byId("train-presets").disabled = !isBase;
  byId("train-own").hidden = !isBase || !boxes().at(-1).checked;
  byId("train-plan").textContent = isBase ? "" : "It goes on with the adapter's own size and layers.";
  if (!isBase) return;
  await Promise.all(boxes().map(async (box) => {
    const place = box.closest(".preset").querySelector(".plan");
    const isHidden = box.value === "own" && !box.checked;
    const body = { ...adapterOf(box), ...rows };
    if (epochs.value) body.epochs = Number(epochs.value);
    const plan = isHidden || !body.rank ? null : await post("/api/plan", body);
    if (mine !== asked) return;
    place.textContent = plan ? sentence(plan) : "";
    place.classList.toggle("fault", Boolean(plan && (plan.why || plan.memory > (plan.free ?? Infinity))));
  }));
}

// Ask once a person pauses, not at each key.
export function startPresets(show) {
  let timer = 0;
  const later = () => {
    clearTimeout(timer);
    timer = setTimeout(() => show().catch(showError), PAUSE);
  };
  for (const name of ["train-presets", "train-passes"]) byId(name).addEventListener("input", later);
}
