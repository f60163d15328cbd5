// Adapters, as cards.

import { curve } from "./curve.js";
import { byId, bytes, facts, make } from "./dom.js";
import { layersButton } from "./layers.js";
import { mergeOf } from "./merge.js";

const number = (value, digits = 3) => (value == null ? null : value.toFixed(digits));

export function method(adapter) {
  if (adapter.method) return adapter.method;
  if (adapter.invocation) return "Activated LoRA";
  return adapter.dora ? "DoRA" : "LoRA";
}

const fileName = (path) => path?.split("/").at(-1); // its directory says nothing to most
const list = (value) => (Array.isArray(value) ? value.join(", ") : value);

// A card stays as it is, with what is open in it, until something else is known of its adapter.
const cards = new Map(); // name -> [what is known, card]

export function showAdapters({ base, adapters, training }) {
  const container = byId("adapters");
  const shown = adapters.map((adapter) => {
    const known = JSON.stringify([adapter, training]);
    if (cards.get(adapter.name)?.[0] !== known) cards.set(adapter.name, [known, cardOf(adapter, training)]);
    return cards.get(adapter.name)[1];
  });
  for (const name of cards.keys()) if (!adapters.some((adapter) => adapter.name === name)) cards.delete(name);
  if (!shown.length) shown.push(make("p", { class: "quiet" }, `None yet: ${base.name} is served as it is. Start with --adapter name=directory, or --adapters-dir.`));
  const same = shown.length === container.children.length && shown.every((card, at) => card === container.children[at]);
  if (!same) container.replaceChildren(...shown); // a card that is moved loses the focus
}

function cardOf(adapter, training) {
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
    ["Acts from", adapter.invocation],
    ["Size", bytes(adapter.bytes)],
    ["Made for", adapter.base],
    ["Trained over", adapter.over],
    ["System prompt", adapter.system],
    ["Trained on", fileName(trained.data)],
    ["Steps", trained.steps],
    ["Last loss", number(adapter.loss)],
    ["Evaluation loss", number(adapter.eval_loss)],
  ]));
  if (adapter.curve) card.append(curve(adapter.curve, adapter.evaluations));
  if (!adapter.error && adapter.rank) card.append(make("p", { class: "acts" }, layersButton(card, adapter.name)));
  if (training && !adapter.error) card.append(mergeOf(adapter.name));
  return card;
}
