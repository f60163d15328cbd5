// The page: five views of one server.

import { method, showAdapters } from "./adapters.js";
import { get } from "./api.js";
import { startChat } from "./chat.js";
import { startCompare } from "./compare.js";
import { byId, bytes, follow, make, showError } from "./dom.js";
import { showRuns } from "./runs.js";
import { fitSettings, addSettings, propose } from "./settings.js";
import { offerBases, openTraining, startTraining } from "./train.js";

const VIEWS = ["chat", "compare", "train", "adapters", "runs"];
let served = { base: { name: "" }, adapters: [] };

const isAdapter = (name) => served.adapters.some((each) => each.name === name);
const view = () => (VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat");

async function show({ focus }) {
  const shown = view();
  showError(null); // of another view
  for (const name of VIEWS) {
    byId(`view-${name}`).hidden = name !== shown;
    const link = document.querySelector(`nav a[href="#${name}"]`);
    if (name === shown) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const title = byId(`title-${shown}`);
  document.title = `${title.textContent} · Veneer`;
  if (focus) {
    title.tabIndex = -1;
    title.focus();
  }
  try {
    if (shown === "runs") await showRuns();
    else await refresh();
    if (shown === "train" && served.training) await openTraining();
  } catch (error) {
    showError(error);
  }
}

// Ask which adapters there are, and offer them, keeping what was chosen.
async function refresh() {
  served = await get("/api/adapters");
  const names = [served.base.name, ...served.adapters.filter((a) => !a.error).map((a) => a.name)];
  const select = byId("chat-model"), before = select.value;
  select.replaceChildren(...names.map((name) => make("option", { value: name }, name === served.base.name ? `${name} (base)` : name)));
  select.value = names.includes(before) ? before : names[1] ?? names[0];
  describeModel();
  const fieldset = byId("compare-models");
  const marked = new Set([...fieldset.querySelectorAll("input:checked")].map((box) => box.value));
  const checked = marked.size ? marked : new Set(names.slice(0, 2));
  fieldset.replaceChildren(make("legend", {}, "Answered by"), ...names.map((name) => {
    const box = make("input", { type: "checkbox", value: name, checked: checked.has(name) });
    return make("label", {}, box, name === served.base.name ? `${name} (base)` : name);
  }));
  byId("base").textContent = served.base.name;
  fitSettings(served.base.context);
  showAdapters(served);
  offerBases(served);
}

// Go to the chat, with an adapter that has just been trained.
async function chatWith(name) {
  try {
    await refresh();
    const adapter = served.adapters.find((each) => each.name === name);
    if (!adapter || adapter.error) throw new Error(adapter?.error ?? `${name} is no longer served.`);
  } catch (error) {
    showError(error);
    return;
  }
  byId("chat-model").value = name;
  describeModel();
  location.hash = "#chat";
}

function describeModel() {
  const adapter = served.adapters.find((each) => each.name === byId("chat-model").value);
  propose(adapter?.system ?? "");
  const details = adapter && [method(adapter), adapter.rank && `rank ${adapter.rank}`, bytes(adapter.bytes)];
  byId("chat-about").textContent = adapter ? details.filter(Boolean).join(", ") : "the base, as it is";
}

addSettings();
startChat(isAdapter);
startCompare(isAdapter);
byId("chat-model").addEventListener("change", describeModel);
window.addEventListener("hashchange", () => show({ focus: true }));
show({ focus: false });
follow(() => view() === "runs", showRuns);
startTraining(() => view() === "train" && served.training, chatWith);
