// The same question to several, side by side, with the words marked in which they differ.

import { answer } from "./api.js";
import { byId, make, announce, sendOnEnter, showError } from "./dom.js";
import { instructions, sampling } from "./settings.js";
import { tokenButton } from "./tokens.js";
import { differing } from "./words.js";

let running = null;

const chosen = () => [...byId("compare-models").querySelectorAll("input:checked")].map((box) => box.value);

async function send(event, isAdapter) {
  event.preventDefault();
  const area = byId("compare-text"), question = area.value.trim(), models = chosen();
  if (!question || running) return;
  if (models.length < 2) {
    showError(new Error("Choose at least two who answer."));
    return;
  }
  showError(null);
  running = new AbortController();
  const messages = [...instructions(), { role: "user", content: question }];
  const region = byId("answers");
  region.replaceChildren(make("p", { class: "question" }, question));
  const row = make("div", { class: "columns" });
  region.append(row);
  region.setAttribute("aria-busy", "true");
  byId("compare-stop").hidden = false;
  const columns = models.map((model) => {
    const text = make("div", { class: "text" }), foot = make("div", { class: "foot" });
    const card = make("article", { class: "answer", "aria-label": model }, make("h3", {}, model), text, foot);
    row.append(card);
    return { model, text, foot, card, reply: "" };
  });
  const results = await Promise.allSettled(columns.map(async (column) => {
    for await (const piece of answer({ model: column.model, messages, ...sampling() }, running.signal)) {
      column.reply += piece;
      column.text.textContent = column.reply;
    }
  }));
  const failed = results.find((r) => r.status === "rejected" && r.reason.name !== "AbortError");
  if (failed) showError(failed.reason);
  const count = mark(columns);
  for (const { model, foot, card, reply } of columns) {
    if (reply && isAdapter(model)) foot.append(tokenButton(card, model, messages, reply));
  }
  byId("compare-stop").hidden = true;
  region.setAttribute("aria-busy", "false");
  running = null;
  announce(count ? `${models.length} answers; ${count} words differ and are marked.` : `${models.length} answers, the same word for word.`);
}

function mark(columns) {
  let count = 0;
  differing(columns.map((c) => c.reply)).forEach((words, i) => {
    columns[i].text.replaceChildren(...words.map(({ word, differs }) => {
      count += differs;
      return differs ? make("mark", {}, word) : word;
    }));
  });
  return count;
}

export function startCompare(isAdapter) {
  byId("compare-form").addEventListener("submit", (event) => send(event, isAdapter));
  sendOnEnter(byId("compare-text"));
  byId("compare-stop").addEventListener("click", () => running?.abort());
}
