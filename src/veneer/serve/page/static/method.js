// How a file is learnt from, by what its rows are: answers, pairs, or prompts that a grader judges.

import { byId, make } from "./dom.js";

export const MEANS = {
  answers: ["row", "The model learns to write what is marked."],
  pairs: ["pair", "The model learns to prefer the chosen answers to the rejected ones."],
  prompts: ["prompt", "The model answers them, and learns from those of its answers that are right."],
};
const SIMILAR = "fuzzy_match";
const pieces = (row) => row.map(([text, learnt]) => (learnt ? make("mark", {}, text) : text));

// One row as the model reads it, what it learns to write marked; of a pair, both answers.
export function rowView(row) {
  const text = make("p", { class: "row" }, ...pieces(row.pieces));
  const tokens = `${row.tokens} tokens`;
  if (row.rejected.length) {
    const rejected = row.rejected.filter(([, learnt]) => learnt).map(([piece]) => piece).join("");
    return make("li", {}, text, make("p", { class: "row" }, make("del", {}, rejected)),
      make("p", { class: "quiet" }, `${tokens}; what is marked is chosen, what is struck out is rejected`));
  }
  return make("li", {}, text, make("p", { class: "quiet" }, row.learnt ? `${tokens}, of which ${row.learnt} are learnt` : tokens));
}

// Ask for what a kind of rows needs. Returns why they cannot be learnt from, or nothing.
export function offerMethod(kind, fields) {
  byId("train-pairs").hidden = kind !== "pairs";
  byId("train-prompts").hidden = kind !== "prompts" || !fields.length;
  byId("train-field").replaceChildren(...fields.map((name) => make("option", { value: name }, name)));
  if (kind === "prompts" && !fields.length) return 'These prompts have nothing to compare answers with: give each row a field such as "answer".';
  return null;
}

// What a job is asked for beside its rows.
export function chosenMethod(kind, { beta, operation, field, group_size, max_new_tokens }) {
  if (kind === "answers") return {};
  if (kind === "pairs") {
    const hyperparameters = beta.value ? { beta: Number(beta.value) } : {};
    return { method: { type: "dpo", dpo: { hyperparameters } } };
  }
  const how = operation.value === SIMILAR ? { type: "text_similarity", evaluation_metric: SIMILAR } : { type: "string_check", operation: operation.value };
  const grader = { ...how, name: "right", input: "{{ sample.output_text }}", reference: `{{ item.${field.value} }}` };
  const sizes = Object.entries({ group_size, max_new_tokens }).filter(([, input]) => input.value);
  return { method: { type: "reinforcement", reinforcement: { grader } }, ...Object.fromEntries(sizes.map(([name, input]) => [name, Number(input.value)])) };
}
