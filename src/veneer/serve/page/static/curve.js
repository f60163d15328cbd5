// A small curve as SVG: a line for training, dots for evaluation, and in words what it shows.

const NS = "http://www.w3.org/2000/svg";
const WIDTH = 320, HEIGHT = 72, PAD = 5;

function svg(tag, attributes) {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

export function curve(points, evaluations = [], last = null) {
  const all = [...points, ...evaluations];
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", class: "curve" });
  if (all.length === 0) return picture;
  const first = points[0] ?? evaluations[0], end = points.at(-1) ?? evaluations.at(-1);
  const evaluation = evaluations.length ? `, evaluation loss ${evaluations.at(-1)[1].toFixed(3)}` : "";
  picture.setAttribute("aria-label", `Loss from ${first[1].toFixed(3)} at step ${first[0]} to ${end[1].toFixed(3)} at step ${end[0]}${evaluation}`);
  const right = Math.max(last ?? 0, ...all.map(([x]) => x)), left = Math.min(...all.map(([x]) => x));
  const low = Math.min(...all.map(([, y]) => y)), high = Math.max(...all.map(([, y]) => y));
  const x = (v) => PAD + ((WIDTH - 2 * PAD) * (v - left)) / (right - left || 1);
  const y = (v) => HEIGHT - PAD - ((HEIGHT - 2 * PAD) * (v - low)) / (high - low || 1);
  const line = points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
  picture.append(svg("line", { x1: PAD, x2: WIDTH - PAD, y1: HEIGHT - 1, y2: HEIGHT - 1, class: "ground" }));
  if (points.length > 1) {
    const corners = `${x(points.at(-1)[0])},${HEIGHT - 1} ${x(points[0][0])},${HEIGHT - 1}`;
    picture.append(svg("polygon", { points: `${line} ${corners}`, class: "under" }));
    picture.append(svg("polyline", { points: line, class: "line" }));
  }
  for (const [a, b] of evaluations) picture.append(svg("circle", { cx: x(a), cy: y(b), r: 2.6, class: "dot" }));
  return picture;
}
