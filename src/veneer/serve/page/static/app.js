// The page: four views of one server.

import { get } from "./api.js";
import { followRuns, method, showAdapters, showRuns } from "./cards.js";
import { startChat } from "./chat.js";
import { startCompare } from "./compare.js";
import { byId, bytes, make, showFault } from "./dom.js";
import { fitSettings, placeSettings } from "./settings.js";

const VIEWS = ["chat", "compare", "adapters", "runs"];
let known = { base: { name: "" }, adapters: [] };

const isAdapter = (name) => known.adapters.some((each) => each.name === name);
const view = () => (VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat");

async function show({ focus }) {
  const shown = view();
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
  } catch (error) {
    showFault(error);
  }
}

// Ask which adapters there are, and offer them, keeping what was chosen.
async function refresh() {
  known = await get("/api/adapters");
  const names = [known.base.name, ...known.adapters.filter((a) => !a.error).map((a) => a.name)];
  const select = byId("chat-model"), before = select.value;
  select.replaceChildren(...names.map((name) => make("option", { value: name }, name === known.base.name ? `${name} (base)` : name)));
  select.value = names.includes(before) ? before : names[1] ?? names[0];
  tellAbout();
  const place = byId("compare-models");
  const marked = new Set([...place.querySelectorAll("input:checked")].map((box) => box.value));
  const wanted = marked.size ? marked : new Set(names.slice(0, 2));
  place.replaceChildren(make("legend", {}, "Answered by"), ...names.map((name) => {
    const box = make("input", { type: "checkbox", value: name, checked: wanted.has(name) });
    return make("label", {}, box, name === known.base.name ? `${name} (base)` : name);
  }));
  byId("base").textContent = known.base.name;
  fitSettings(known.base.context);
  showAdapters(known);
}

function tellAbout() {
  const adapter = known.adapters.find((each) => each.name === byId("chat-model").value);
  const parts = adapter && [method(adapter), adapter.rank && `rank ${adapter.rank}`, bytes(adapter.bytes)];
  byId("chat-about").textContent = adapter ? parts.filter(Boolean).join(", ") : "the base, as it is";
}

placeSettings();
startChat(isAdapter);
startCompare(isAdapter);
byId("chat-model").addEventListener("change", tellAbout);
window.addEventListener("hashchange", () => show({ focus: true }));
show({ focus: false });
followRuns(() => view() === "runs");
