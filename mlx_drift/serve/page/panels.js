// What drafting came to, drawn.

import { element, kindOf } from "./answer.js";

const WIDTH = 320;
const SHOWN = 40; // rounds

function draw(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function picture(height, said, parts) {
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": said });
  svg.append(...parts);
  return svg;
}

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

const WATCHED = 16; // rounds whose mean is shown
const CLASSES = ["sink", "prompt", "answer", "recent", "drafts"];

function mean(lists) {
  const steps = Math.max(...lists.map((list) => list.length));
  return Array.from({ length: steps }, (_, step) => {
    const there = lists.filter((list) => step < list.length);
    return there.reduce((sum, list) => sum + list[step], 0) / there.length;
  });
}

// What the drafter's chain recycled (a bar a step) and attended to (its parts), over the last rounds.
export function drift(all) {
  const last = all.filter((round) => round.drift).slice(-WATCHED).map((round) => round.drift);
  if (!last.length) return null;
  const rms = mean(last.map((one) => one.rms));
  const masses = CLASSES.map((name) => mean(last.map((one) => one.attention[name])));
  const most = Math.max(...rms), high = 60, wide = Math.min(48, (WIDTH - 20) / rms.length), gap = 84;
  const parts = [
    draw("text", { x: 0, y: 11 }, "RMS of the state by step"),
    draw("text", { x: 0, y: gap + 27 }, "attention by step (the colours: below)"),
  ];
  rms.forEach((size, step) => {
    const x = 10 + step * wide, width = Math.max(2, wide - 4), base = 16 + high;
    parts.push(draw("rect", {
      class: "bar", x, width, y: base - high * size / most, height: high * size / most,
    }));
    let y = gap + 34 + high;
    CLASSES.forEach((name, n) => {
      const height = high * masses[n][step];
      y -= height;
      parts.push(draw("rect", { class: `mass ${name}`, x, width, y, height }));
    });
    parts.push(draw("text", { x: x + width / 2 - 3, y: gap + 47 + high }, step + 1));
  });
  const said = `${last.length === 1 ? "one round" : `the last ${last.length} rounds`}: the state `
    + `has an RMS of ${rms[0].toFixed(2)} at step 1 and ${rms.at(-1).toFixed(2)} at step ${rms.length}`;
  const cell = (value) => element("td", {}, value.toFixed(2));
  const table = element("table", { class: "drift" },
    element("thead", {}, element("tr", {}, 
      ...["step", "RMS"].map((name) => element("th", { scope: "col" }, name)),
      ...CLASSES.map((name) => element("th", { scope: "col" },
        element("span", { class: `swatch ${name}` }), name)))),
    element("tbody", {}, ...rms.map((size, step) => element("tr", {},
      element("th", { scope: "row" }, String(step + 1)), cell(size),
      ...masses.map((mass) => cell(mass[step])),
    ))));
  return { parts: [picture(gap + 54 + high, said, parts), table], said };
}
