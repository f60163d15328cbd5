// What the page asks the server for. The key, if there is one, stays in this tab.

const KEY = "veneer-key";

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = { ...(options.body ? { "content-type": "application/json" } : {}) };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) {
    await newKey();
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
      const piece = event.choices[0]?.delta?.content;
      if (piece) yield piece;
    }
  }
}

let asking = null;

// Ask the person for the key, once for all that wait for it.
function newKey() {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key");
    dialog.addEventListener("close", () => {
      sessionStorage.setItem(KEY, document.getElementById("key-text").value.trim());
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}
