// Messages as elements. All that comes from the model is text, never markup.

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const LETTERS = { copy: "c", forced: "f" };

// The class of who said a token: d1 to d3, d4 for all drafts behind, a copy, or what a grammar
// forced; none for the target.
export function kindOf(token) {
  if (!token.position) return "";
  return token.by in LETTERS ? token.by : `d${Math.min(token.position, 4)}`;
}

function marked(token, text, mark = markOf(token)) {
  return element("span", { class: `t ${kindOf(token)}`, "data-mark": mark, title: nameOf(token) }, text);
}

export function markOf(token) {
  return `${LETTERS[token.by] ?? ""}${token.position}`;
}

export function nameOf(token) {
  return token.position ? `${token.by} ${token.position}` : token.by;
}

// A token: its letters in a span that says who said them, and the space around as it is.
function tokenNodes(token) {
  const { text } = token;
  if (!token.position) return [text];
  const letters = text.trim();
  if (!letters) return [marked(token, "", `␣${markOf(token)}`), text];
  const start = text.indexOf(letters);
  return [text.slice(0, start), marked(token, letters), text.slice(start + letters.length)];
}

export class Message {
  constructor(message) {
    this.said = this.place = element("div", { class: "said" });
    this.note = element("p", { class: "note" });
    const who = message.role === "user" ? "You" : "Model";
    const heading = element("h2", {}, who);
    this.root = element("li", { class: `message ${message.role}` }, heading, this.said, this.note);
    if (message.rounds) message.rounds.forEach((round) => this.round(round));
    else this.said.append(message.content);
    if (message.note) this.note.textContent = message.note;
  }

  round(round) {
    for (const token of round.tokens) {
      if (token.reasoning) {
        this.place = this.reasoning;
        this.place.append(...tokenNodes({ ...token, text: token.reasoning }));
        if (!token.text) continue;
      }
      if (token.text) this.place = this.said;
      this.place.append(...tokenNodes(token)); // one that added nothing stands where the last does
    }
  }

  get reasoning() {
    const there = this.root.querySelector(".reasoning");
    if (there) return there;
    const made = element("div", { class: "said reasoning" });
    this.said.before(made);
    return made;
  }
}

export function legend(met) {
  const kinds = Object.keys(LETTERS); // behind the target and its drafts
  const origins = met.toSorted(
    (a, b) => kinds.indexOf(a.by) - kinds.indexOf(b.by) || a.position - b.position,
  );
  const shown = (token) => (token.position ? marked(token, nameOf(token)) : nameOf(token));
  return origins.map((token) => element("li", {}, shown(token)));
}
