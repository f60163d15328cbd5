// What a job answers as it learns: the model that it starts from, then each checkpoint, then the result.

import { answer, get, post } from "./api.js";
import { announce, make, showError } from "./dom.js";
import { sampling } from "./settings.js";
import { differing } from "./words.js";

const MOST_TOKENS = 96;
const TRIES = 3; // of a checkpoint, which is served a moment after it is written, and goes when a newer one comes
const GOING = ["queued", "running", "paused"];

// Return a place in a job's card that a person opens, and `follow(job)`, which asks whatever is new.
export function samplesOf(jobs, job) {
  const question = make("textarea", { rows: 2, "aria-label": `Question to ${job.run}` });
  const expected = make("p", { class: "quiet" });
  const log = make("div", { class: "samples-log", role: "log", "aria-label": `Answers of ${job.run} as it learns`, tabindex: "0" });
  const details = make("details", { class: "samples" }, make("summary", {}, "Answers as it learns"), question, expected, log);
  let before = [], tools = []; // the turns before the question, and the functions that an answer may call
  let asked = ""; // which may be another by now in the field, half typed
  let tries = new Map(); // by model
  let first = null; // the answer of the model that the job starts from
  let last = job, round = 0, isBusy = false, isReady = false, isDone = false;

  async function propose() {
    const { asks } = await post("/api/rows", { file: job.training_file, model: job.model });
    if (!asks.length || question.value) return;
    before = asks[0].messages.slice(0, -1);
    tools = asks[0].tools;
    question.value = asks[0].messages.at(-1).content;
    expected.textContent = asks[0].answer && `Its first row answers: ${asks[0].answer}`;
  }

  async function ask(model, label) {
    const mine = round;
    const messages = [...before, { role: "user", content: asked }];
    let reply = "";
    const most = Math.min(MOST_TOKENS, sampling().max_tokens ?? MOST_TOKENS); // which fits the context
    const body = { model, messages, temperature: 0, max_tokens: most, ...(tools.length ? { tools } : {}) };
    for await (const piece of answer(body)) reply += piece;
    if (mine !== round) return;
    first ??= reply;
    const words = differing([first, reply])[1].map(({ word, differs }) => (differs ? make("mark", {}, word) : word));
    const text = make("p", { class: "text" }, ...(reply ? words : [make("span", { class: "quiet" }, "(an empty answer)")]));
    log.append(make("article", { "aria-label": label }, make("p", { class: "who" }, label), text));
    log.scrollTop = log.scrollHeight;
  }

  async function askWhatIsNew() {
    const now = last; // a newer one may come while these models answer
    const { data } = await get(`${jobs}/${job.id}/checkpoints?limit=100`);
    const models = [[job.model, `before: ${job.model}`], ...data.reverse().map((each) => [each.fine_tuned_model_checkpoint, `step ${each.step_number}`])];
    if (now.fine_tuned_model) models.push([now.fine_tuned_model, "the result"]);
    for (const [model, label] of models.filter(([model]) => (tries.get(model) ?? 0) < TRIES)) {
      const mine = round;
      tries.set(model, (tries.get(model) ?? 0) + 1);
      try {
        await ask(model, label);
        if (mine !== round) return;
        tries.set(model, TRIES);
      } catch (error) {
        if (mine !== round) return;
        if (error.status === 404) continue;
        tries.set(model, TRIES);
        throw error;
      }
    }
    isDone = !GOING.includes(now.status) && models.every(([model]) => tries.get(model) === TRIES);
  }

  async function follow(now) {
    last = now;
    if (GOING.includes(now.status)) isDone = false; // one that had failed goes on
    if (isBusy || isDone || !isReady || !details.open || !asked) return;
    const mine = round;
    isBusy = true;
    await askWhatIsNew().catch(showError);
    isBusy = false;
    if (mine !== round) follow(last);
  }

  question.addEventListener("change", () => {
    round += 1;
    asked = question.value.trim();
    before = before.filter((turn) => turn.role === "system");
    expected.textContent = "";
    tries = new Map();
    first = null;
    isDone = false;
    log.replaceChildren();
    follow(last);
  });
  details.addEventListener("toggle", async () => {
    if (!details.open) return;
    if (!isReady) await propose().catch((error) => error.status !== 404 && showError(error)); // its file may be gone
    isReady = true;
    asked = question.value.trim();
    if (question.value) announce(`${job.run} is asked: ${question.value}`);
    follow(last);
  });
  return { details, follow };
}
