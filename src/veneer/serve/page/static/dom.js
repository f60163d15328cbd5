// Small helpers for building the page; all text goes in as text, never as markup.

export const byId = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value == null) continue;
    element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

export function facts(rows) {
  const list = make("dl");
  for (const [term, value] of rows) {
    if (value != null && value !== "") list.append(make("dt", {}, term), make("dd", {}, String(value)));
  }
  return list;
}

// Let a screen reader say something.
export function announce(text) {
  byId("status").textContent = text;
}

export function showError(error) {
  const banner = byId("fault");
  banner.textContent = error?.message ?? "";
  banner.hidden = !error;
}

// Look again every second while a view is on the screen. The error of a look goes with the next.
export async function follow(isShown, show) {
  let failure = null;
  for (;;) {
    if (isShown() && !document.hidden) {
      try {
        await show();
        if (failure && byId("fault").textContent === failure.message) showError(null);
        failure = null;
      } catch (error) {
        if (isShown()) showError(failure = error);
      }
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

export const bytes = (n) =>
  n < 1e3 ? `${n} B` : n < 1e6 ? `${Math.round(n / 1e3)} kB` : n < 1e9 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e9).toFixed(1)} GB`;

export const percent = (p) => (p >= 0.1 ? `${(100 * p).toFixed(0)} %` : `${(100 * p).toPrecision(2)} %`);

export function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min${s % 60 ? ` ${s % 60} s` : ""}`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

// Enter sends; Shift+Enter makes a new line.
export function sendOnEnter(area) {
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      area.form.requestSubmit();
    }
  });
}
