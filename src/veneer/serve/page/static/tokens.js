// How much likelier each token of an answer became through the adapter.

import { post } from "./api.js";
import { make, percent, announce, showError } from "./dom.js";

const SHOWN = 8; // rows of the table
const FULL = 3; // nats at which a colour is at its strongest

const visible = (text) => text.replaceAll("\n", "↵").replaceAll(" ", "␣") || "…";

function factor(change) {
  if (Math.abs(change) < 0.05) return "as likely as before";
  const times = Math.exp(Math.abs(change));
  const shown = times >= 1e6 ? times.toExponential(0) : times >= 10 ? Math.round(times).toLocaleString("en") : times.toFixed(1);
  return change > 0 ? `${shown} times likelier` : `${shown} times less likely`;
}

function tokenView(tokens) {
  const text = make("p", { class: "tokens" });
  for (const token of tokens) {
    const change = token.adapter - token.base;
    const strength = Math.min(4, Math.round((4 * Math.abs(change)) / FULL));
    const title = `${factor(change)}: ${percent(Math.exp(token.base))} → ${percent(Math.exp(token.adapter))}`;
    text.append(make("span", { class: strength ? `${change > 0 ? "up" : "down"}${strength}` : null, title: title }, token.text));
  }
  const table = make("table", {}, make("caption", {}, "What the adapter changed most"));
  const head = make("tr");
  for (const title of ["Token", "Base", "Adapter", "Change"]) head.append(make("th", { scope: "col" }, title));
  table.append(make("thead", {}, head));
  const body = make("tbody");
  const sorted = [...tokens].sort((a, b) => Math.abs(b.adapter - b.base) - Math.abs(a.adapter - a.base));
  for (const token of sorted.slice(0, SHOWN)) {
    body.append(make("tr", {},
      make("th", { scope: "row" }, visible(token.text)),
      make("td", {}, percent(Math.exp(token.base))),
      make("td", {}, percent(Math.exp(token.adapter))),
      make("td", {}, factor(token.adapter - token.base))));
  }
  table.append(body);
  const key = make("p", { class: "quiet" }, make("span", { class: "up3" }, "likelier"), " and ",
    make("span", { class: "down3" }, "less likely"), " with the adapter than without");
  return make("div", { class: "token-view" }, text, key, table);
}

// Return a button that shows the view below `card` and takes it away again.
export function tokenButton(card, model, messages, answer) {
  const button = make("button", { type: "button", class: "plain small", "aria-expanded": "false" }, "Tokens");
  let shown = null, asked = false; // a disabled button would lose the focus
  button.addEventListener("click", async () => {
    if (asked) return;
    if (shown) {
      shown.remove();
      shown = null;
    } else {
      asked = true;
      try {
        const { tokens } = await post("/api/tokens", { model, messages, answer });
        shown = tokenView(tokens);
        card.append(shown);
        announce(`The tokens of the answer, with ${model} and without, are shown.`);
      } catch (error) {
        showError(error);
      }
      asked = false;
    }
    button.setAttribute("aria-expanded", String(Boolean(shown)));
  });
  return button;
}
