// What the page asks the server for. The keys, if there are any, stay in this tab.

const KEY = "veneer-key", ADMIN_KEY = "veneer-admin-key";
const TRAINING = ["/v1/files", "/v1/fine_tuning", "/api/rows", "/api/plan", "/api/jobs", "/api/merges"]; // ask for the admin key

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = { ...(typeof options.body === "string" ? { "content-type": "application/json" } : {}) };
  const which = TRAINING.some((start) => path.startsWith(start)) ? ADMIN_KEY : KEY;
  const key = sessionStorage.getItem(which), mayAsk = !declined.has(which);
  if (key) headers.authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401 && mayAsk && !declined.has(which)) {
    if (sessionStorage.getItem(which) === key) await newKey(which); // else it was given meanwhile
    return ask(path, options);
  }
  const errorBody = await response.json().catch(() => null);
  throw new Refused(errorBody?.error?.message ?? `The server answered ${response.status}.`, response.status);
}

export async function get(path) {
  return (await ask(path)).json();
}

export async function post(path, body, signal) {
  return (await ask(path, { method: "POST", body: JSON.stringify(body), signal })).json();
}

// Send a file of rows.
export async function upload(file) {
  const body = new FormData();
  body.append("purpose", "fine-tune");
  body.append("file", file, file.name);
  return (await ask("/v1/files", { method: "POST", body })).json();
}

// Let the browser save what is at a path, which a link could not ask for with a key.
export async function save(path, name) {
  const url = URL.createObjectURL(await (await ask(path)).blob());
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// Yield the pieces of an answer as they come.
export async function* answer(body, signal) {
  const asked = { ...body, stream: true };
  const response = await ask("/v1/chat/completions", { method: "POST", body: JSON.stringify(asked), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Refused(event.error.message, 500);
      const delta = event.choices[0]?.delta;
      if (delta?.content) yield delta.content;
      for (const { function: called } of delta?.tool_calls ?? []) yield `${called.name ? `${called.name} ` : ""}${called.arguments ?? ""}`;
    }
  }
}

let asking = null;
const declined = new Set(); // keys that nobody gave: views that follow something would ask each second
addEventListener("hashchange", () => declined.clear());

// Ask the person for a key, once for all that wait for one; whoever gives none stays without.
function newKey(which) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = document.getElementById("key"), text = document.getElementById("key-text");
    const isAdmin = which === ADMIN_KEY;
    document.getElementById("key-title").textContent = isAdmin ? "Training asks for the admin key" : "This server asks for a key";
    document.querySelector("label[for=key-text]").textContent = isAdmin ? "Admin key" : "API key";
    text.value = dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      asking = null;
      if (dialog.returnValue !== "given") {
        declined.add(which);
        reject(new Refused(`This needs the ${isAdmin ? "admin" : "API"} key; open the view again to give it.`, 401));
        return;
      }
      sessionStorage.setItem(which, text.value.trim());
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}
