// An adapter merged into the base: asked for, followed while a process does it, and its certificate.

import { get, post, save } from "./api.js";
import { announce, bytes, facts, make, showError } from "./dom.js";

const RETRY = 3000; // milliseconds after a look that failed
const nats = (value) => (value == null ? null : `${value.toPrecision(2)} nats a token`);

// Return a place in a card which looks once it is opened, and again each second while it merges.
export function mergeOf(name) {
  const content = make("div", {});
  const details = make("details", { class: "merge" }, make("summary", {}, "Merged model"), content);
  const path = `/api/merges?${new URLSearchParams({ model: name })}`;
  let state = "", timer = 0;

  function button(text, act) {
    const made = make("button", { type: "button", class: "plain small", "aria-label": `${text} ${name}` }, text);
    let asked = false; // a disabled button would lose the focus
    made.addEventListener("click", async () => {
      if (asked) return;
      asked = true;
      await act().catch(showError);
      asked = false;
    });
    return made;
  }

  const begin = button("Merge", async () => show(await post("/api/merges", { model: name })));
  const download = button("Download merged", async () => {
    await save(`/api/merges/model?${new URLSearchParams({ model: name })}`, `${name}-merged.zip`);
    announce(`${name} is saved as a merged model.`);
  });

  function show(merge) {
    const hadFocus = content.contains(document.activeElement);
    if (merge.state === "none") content.replaceChildren(make("p", { class: "quiet" }, "One model with the change in its own weights, for programs that know no adapters."), begin);
    if (merge.state === "running") content.replaceChildren(make("p", { class: "quiet", tabindex: "-1" }, `It is ${merge.doing} …`));
    if (merge.state === "failed") content.replaceChildren(make("p", { class: "fault" }, merge.why), begin);
    if (merge.state === "done") {
      const { certificate } = merge;
      content.replaceChildren(make("p", {}, merge.verdict), facts([
        ["The adapter's effect", nats(certificate.effect)],
        ["Lost of it", nats(certificate.divergence)],
        ["Weights", certificate.dtype],
        ["Compared on", `${certificate.tokens} tokens`],
        ["Size", bytes(merge.bytes)],
        ["Below --runs", merge.place],
      ]), download);
    }
    if (hadFocus) (content.querySelector("button") ?? content.firstChild).focus();
    if (state === "running" && merge.state !== "running") announce(merge.verdict ?? merge.why);
    state = merge.state;
    if (state === "running") lookAgain(1000);
  }

  function lookAgain(milliseconds) {
    clearTimeout(timer); // one look follows, however often the place was opened
    timer = setTimeout(look, milliseconds);
  }

  async function look() {
    if (!details.isConnected || !details.open) return;
    try {
      show(await get(path));
    } catch (error) {
      showError(error);
      if (error.status !== 401) lookAgain(RETRY); // without the key every look would fail
    }
  }

  details.addEventListener("toggle", look);
  return details;
}
