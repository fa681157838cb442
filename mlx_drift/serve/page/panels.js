// What drafting came to, drawn.

import { kindOf } from "./answer.js";

const WIDTH = 320;
const SHOWN = 40; // rounds

function draw(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

export function picture(height, said, parts) {
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": said });
  svg.append(...parts);
  return svg;
}

export { draw, WIDTH };

// A column a round: a cell for each accepted draft, an empty one for the first that was not.
export function rounds(all) {
  const drafted = all.filter((round) => round.tested > 0);
  if (!drafted.length) return null;
  const last = drafted.slice(-SHOWN);
  const accepted = (round) => round.tokens.filter((token) => token.position);
  const most = Math.max(...last.map((round) => round.tested), 3);
  const high = Math.min(18, 108 / most), wide = (WIDTH - 20) / SHOWN, base = most * high + 6;
  const parts = [draw("line", { class: "axis", x1: 18, x2: WIDTH, y1: base, y2: base })];
  for (let n = 1; n <= most; n++) {
    if (most > 6 && n % 2) continue;
    parts.push(draw("text", { x: 0, y: base - (n - 0.3) * high }, n));
  }
  last.forEach((round, column) => {
    const cells = accepted(round).map(kindOf);
    if (round.tested > cells.length) cells.push("none");
    cells.forEach((kind, n) => parts.push(draw("rect", {
      class: `cell ${kind}`, x: 20 + column * wide, y: base - (n + 1) * high + 1,
      width: Math.max(1, wide - 1.5), height: high - 1.5,
    })));
  });
  const total = drafted.reduce((sum, round) => sum + accepted(round).length, 0);
  const said = `${drafted.length} rounds, ${(total / drafted.length).toFixed(2)} drafts accepted `
    + "a round; dashed: the first that was not";
  return { svg: picture(base + 4, said, parts), said };
}

// Bars with what they say: [words, size, class].
export function bars(rows, said) {
  const most = Math.max(...rows.map(([, size]) => size), 1e-9);
  const parts = rows.flatMap(([words, size, kind], n) => [
    draw("text", { x: 0, y: 13 + n * 34 }, words),
    draw("rect", {
      class: `bar ${kind}`, x: 0.5, y: 17.5 + n * 34,
      width: Math.max(1, (WIDTH - 1) * size / most), height: 9,
    }),
  ]);
  return picture(rows.length * 34, said, parts);
}
