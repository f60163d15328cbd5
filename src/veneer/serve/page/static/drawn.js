// The answers that a job on samples drew in its last step, each with its reward.

import { get } from "./api.js";
import { make, showError } from "./dom.js";

const grade = (value) => (value == null ? "–" : value.toFixed(2));

function table(prompt, answers) {
  const rows = answers.map(({ answer, reward }) => make("tr", {}, make("td", { class: "row" }, answer || "(an empty answer)"), make("td", {}, grade(reward))));
  const head = make("tr", {}, make("th", { scope: "col" }, "Answer"), make("th", { scope: "col" }, "Reward"));
  return make("table", { class: "drawn" }, make("caption", { class: "row" }, prompt), make("thead", {}, head), make("tbody", {}, ...rows));
}

// Return a place in a job's card that a person opens, and `follow()`, which looks for a newer step.
export function drawnOf(job) {
  const place = make("div", { class: "samples-log", role: "region", "aria-label": `Answers and rewards of ${job.run}`, tabindex: "0" });
  const details = make("details", { class: "samples" }, make("summary", {}, "Its answers and their rewards"), place);
  let shown = null;
  async function follow() {
    if (!details.open) return;
    const { step, groups } = await get(`/api/jobs/${job.id}/samples`);
    if (step === shown) return;
    shown = step;
    const title = step == null ? "No step has ended yet." : `Step ${step}`;
    place.replaceChildren(make("p", { class: "quiet" }, title), ...groups.map(({ prompt, answers }) => table(prompt, answers)));
  }
  details.addEventListener("toggle", () => follow().catch(showError));
  return { details, follow: () => follow().catch(showError) };
}
