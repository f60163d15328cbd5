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

// The curves of two runs over the same axes, which carry their ends in numbers.
export function curves(runs) {
  const picture = svg("svg", { viewBox: "0 0 640 200", role: "img", class: "curve both" });
  const all = runs.flatMap((run) => [...run.curve, ...run.evaluations]);
  if (!all.length) return picture;
  const right = Math.max(...runs.map((run) => run.steps ?? 0), ...all.map(([x]) => x)), left = Math.min(...all.map(([x]) => x));
  const low = Math.min(...all.map(([, y]) => y)), high = Math.max(...all.map(([, y]) => y));
  const x = (v) => 56 + (576 * (v - left)) / (right - left || 1);
  const y = (v) => 176 - (164 * (v - low)) / (high - low || 1);
  const label = (text, at) => picture.append(Object.assign(svg("text", at), { textContent: text }));
  picture.append(svg("line", { x1: 56, x2: 632, y1: 180, y2: 180, class: "ground" }));
  label(high.toFixed(2), { x: 50, y: 18, "text-anchor": "end" });
  label(low.toFixed(2), { x: 50, y: 179, "text-anchor": "end" });
  label(`step ${left}`, { x: 56, y: 198 });
  label(`step ${right}`, { x: 632, y: 198, "text-anchor": "end" });
  runs.forEach((run, i) => {
    const points = run.curve.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
    picture.append(svg("polyline", { points, class: `line of${i}` }));
    for (const [a, b] of run.evaluations) picture.append(svg("circle", { cx: x(a), cy: y(b), r: 3, class: `dot of${i}` }));
  });
  const words = runs.map((run) => (run.curve.length ? `${run.name} from ${run.curve[0][1].toFixed(3)} to ${run.curve.at(-1)[1].toFixed(3)} at step ${run.curve.at(-1)[0]}` : `${run.name} without a step`));
  picture.setAttribute("aria-label", `Losses: ${words.join("; ")}`);
  return picture;
}
