// A conversation with the base or one adapter.

import { answer } from "./api.js";
import { byId, make, announce, sendOnEnter, showError } from "./dom.js";
import { instructions, sampling } from "./settings.js";
import { tokenButton } from "./tokens.js";

let turns = [];
let running = null;

function bubble(who, role) {
  const text = make("div", { class: "text" });
  const foot = make("div", { class: "foot" });
  const turn = make("article", { class: `turn ${role}`, "aria-label": who }, make("p", { class: "who" }, who), text, foot);
  byId("log").append(turn);
  turn.scrollIntoView({ block: "end" });
  return { turn, text, foot };
}

async function send(event, isAdapter) {
  event.preventDefault();
  const area = byId("chat-text"), question = area.value.trim();
  if (!question || running) return;
  showError(null);
  area.value = "";
  bubble("You", "user").text.textContent = question;
  const model = byId("chat-model").value;
  const messages = [...instructions(), ...turns, { role: "user", content: question }];
  const { turn, text, foot } = bubble(model, "assistant");
  const log = byId("log");
  running = new AbortController();
  busy(true);
  let reply = "", ended = false;
  try {
    for await (const piece of answer({ model, messages, ...sampling() }, running.signal)) {
      reply += piece;
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
      text.textContent = reply;
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
    ended = true;
  } catch (error) {
    if (error.name !== "AbortError") showError(error);
  }
  busy(false);
  running = null;
  if (!turn.isConnected) return; // a new conversation has begun meanwhile
  if (!reply) {
    if (ended) text.append(make("span", { class: "quiet" }, "(an empty answer)"));
    else turn.remove();
    return;
  }
  turns = [...messages.filter((m) => m.role !== "system"), { role: "assistant", content: reply }];
  if (isAdapter(model)) foot.append(tokenButton(turn, model, messages, reply));
  announce(`${model} has answered.`); // the words themselves are the log's
}

function busy(is) {
  byId("log").setAttribute("aria-busy", String(is)); // heard once it is whole
  byId("chat-stop").hidden = !is;
}

export function startChat(isAdapter) {
  byId("chat-form").addEventListener("submit", (event) => send(event, isAdapter));
  sendOnEnter(byId("chat-text"));
  byId("chat-stop").addEventListener("click", () => running?.abort());
  byId("chat-new").addEventListener("click", () => {
    running?.abort();
    turns = [];
    byId("log").replaceChildren();
    byId("chat-text").focus();
  });
}
