// How much an adapter changes each layer: a table whose cells are coloured by their numbers.

import { get } from "./api.js";
import { announce, make, showError } from "./dom.js";

const LEVELS = 6; // of colour
const percent = (share) => (share < 0.001 ? "<0.1" : (100 * share).toFixed(share < 0.1 ? 1 : 0));
const length = (values) => Math.hypot(...values);

function layersView(name, { rows, columns, cells, note }) {
  const isShare = cells.every((cell) => cell.weight);
  const value = (cell) => (isShare ? cell.change / cell.weight : cell.change);
  const text = (number) => (isShare ? percent(number) : number.toPrecision(2));
  const at = new Map(cells.map((cell) => [`${cell.row} ${cell.column}`, cell]));
  const most = cells.reduce((a, b) => (value(b) > value(a) ? b : a));
  const whole = length(cells.map((cell) => cell.change)) / (isShare ? length(cells.map((cell) => cell.weight)) : 1);
  const unit = isShare ? " %" : "";
  const where = rows.includes(most.row) && most.row !== "–" ? `${most.column} of block ${most.row}` : most.column;
  const words = `All changes together are ${text(whole)}${unit} of the weights that they change; the largest is ${text(value(most))}${unit}, in ${where}.`;
  const summary = isShare ? words : `The largest change is ${text(value(most))}, in ${where}.`;
  const head = make("tr", {}, make("th", { scope: "col" }, "Block"), ...columns.map((column) => make("th", { scope: "col" }, column.replace(/_proj$/, ""))));
  const body = rows.map((row) => make("tr", {}, make("th", { scope: "row" }, row), ...columns.map((column) => {
    const cell = at.get(`${row} ${column}`);
    if (!cell) return make("td");
    const level = Math.round((LEVELS * value(cell)) / (value(most) || 1));
    return make("td", { class: `heat${level}` }, text(value(cell)));
  })));
  const caption = make("caption", {}, isShare ? "Length of each change, in % of its weight's" : "Length of each change");
  const table = make("table", { class: "heat" }, caption, make("thead", {}, head), make("tbody", {}, ...body));
  const scroll = make("div", { class: "scroll", role: "region", "aria-label": `What ${name} changes, layer by layer`, tabindex: "0" }, table);
  return make("div", { class: "layers" }, make("p", { class: "quiet" }, [summary, note].filter(Boolean).join(" ")), scroll);
}

// Return a button that shows the picture in `place` and takes it away again.
export function layersButton(place, name) {
  const button = make("button", { type: "button", class: "plain small", "aria-expanded": "false", "aria-label": `What ${name} changes` }, "What it changes");
  let view = null, asked = false; // a disabled button would lose the focus
  button.addEventListener("click", async () => {
    if (asked) return;
    if (view) {
      view.remove();
      view = null;
    } else {
      asked = true;
      try {
        view = layersView(name, await get(`/api/adapters/${encodeURIComponent(name)}/layers`));
        place.append(view);
        announce(view.firstChild.textContent);
      } catch (error) {
        showError(error);
      }
      asked = false;
    }
    button.setAttribute("aria-expanded", String(Boolean(view)));
  });
  return button;
}
