// The page: what was said, what is asked, and what drafting came to.

import { Message, legend, nameOf } from "./answer.js";
import { Refused, answer, curl, models } from "./api.js";
import { bars, drift, rounds } from "./panels.js";

const PLACE = "mlx-drift"; // in sessionStorage: of this tab alone, and it outlives a reload
const SETTINGS = ["model", "k", "temperature", "most", "system", "key", "drafts", "marks", "watch"];
const get = (id) => document.getElementById(id);

let messages = [];
let abort = null;

const read = (id) => (get(id).type === "checkbox" ? get(id).checked : get(id).value);

function keep() {
  const settings = Object.fromEntries(SETTINGS.map((id) => [id, read(id)]));
  try {
    sessionStorage.setItem(PLACE, JSON.stringify({ messages, settings, text: get("text").value }));
  } catch { /* there is no room, or it is switched off: a reload begins anew then */ }
}

function recall() {
  let kept;
  try {
    kept = JSON.parse(sessionStorage.getItem(PLACE));
  } catch { /* what is no JSON is not ours */ }
  if (!kept) return;
  messages = kept.messages;
  get("text").value = kept.text;
  for (const [id, value] of Object.entries(kept.settings)) {
    const field = get(id);
    if (id === "model") field.append(new Option(value, value, true, true));
    else if (field.type === "checkbox") field.checked = value;
    else field.value = value;
  }
}

function request() {
  const number = (id, name) => (get(id).value === "" ? {} : { [name]: Number(get(id).value) });
  const system = get("system").value.trim();
  const said = messages.map(({ role, content, reasoning_content }) => (
    { role, content, ...(reasoning_content ? { reasoning_content } : {}) }
  ));
  return {
    ...(get("model").value ? { model: get("model").value } : {}),
    messages: [...(system ? [{ role: "system", content: system }] : []), ...said],
    ...number("temperature", "temperature"),
    ...number("most", "max_tokens"),
    ...(get("drafts").checked ? number("k", "num_draft_tokens") : { num_draft_tokens: 0 }),
    stream: true,
    stream_options: { include_usage: true },
    speculative: { tokens: true, ...(get("watch").checked ? { drift: true } : {}) },
  };
}

function say(text, isError = false) {
  get("status").textContent = text;
  get("status").classList.toggle("error", isError);
}

function showCurl() {
  const asked = request();
  const next = get("text").value.trim();
  if (next && !abort) asked.messages.push({ role: "user", content: next });
  get("curl").textContent = curl(asked, get("key").value);
}

function showPanels(message) {
  const all = message?.rounds ?? [];
  const met = new Map([["target", { by: "target", position: 0 }]]);
  for (const one of messages) {
    for (const token of (one.rounds ?? []).flatMap((round) => round.tokens)) {
      met.set(nameOf(token), token);
    }
  }
  get("legend").replaceChildren(...legend([...met.values()]));

  const drawn = rounds(all);
  get("rounds").replaceChildren(...(drawn ? [drawn.svg] : []));
  get("rounds-said").textContent = drawn ? drawn.said
    : all.length ? "No drafts: plain decoding." : "No round yet.";

  const tokens = all.reduce((sum, round) => sum + round.tokens.length, 0);
  const seconds = all.reduce((sum, round) => sum + round.seconds, 0);
  const plain = message?.usage?.speculative.plain_step_seconds;
  if (tokens && seconds) {
    const rate = tokens / seconds;
    const words = (one) => `${one.toFixed(one < 10 ? 1 : 0)} tokens a second`;
    const rows = [[`this answer: ${words(rate)}`, rate, ""]];
    if (plain) rows.push([`plain decoding's measured step: ${words(1 / plain)}`, 1 / plain, "plain"]);
    const times = plain ? rate * plain : null;
    const said = times === null ? "Plain decoding is timed at an answer's end."
      : times >= 1 ? `${times.toFixed(2)}× faster than plain decoding`
        : `${(1 / times).toFixed(2)}× slower than plain decoding`;
    get("speed").replaceChildren(bars(rows, said));
    get("speed-said").textContent = said;
  } else {
    get("speed").replaceChildren();
    get("speed-said").textContent = "No answer yet.";
  }

  const usage = message?.usage;
  if (usage) {
    const cached = usage.prompt_tokens_details.cached_tokens;
    const said = `${cached} of ${usage.prompt_tokens} tokens were in the cache`;
    const rows = [["in the cache", cached, ""], ["in all", usage.prompt_tokens, "plain"]];
    get("cached").replaceChildren(bars(rows, said));
    get("cached-said").textContent = said;
  } else {
    get("cached").replaceChildren();
    get("cached-said").textContent = "No answer yet.";
  }

  const inside = drift(all);
  get("drift").replaceChildren(...(inside ? inside.parts : []));
  get("drift-said").textContent = inside ? inside.said : "No round was watched yet.";
}

function show() {
  get("messages").replaceChildren(...messages.map((message) => new Message(message).root));
  get("empty").hidden = messages.length > 0;
  showPanels(messages.findLast((message) => message.rounds));
  showCurl();
}

function isAtEnd() {
  const page = document.documentElement;
  return page.scrollHeight - page.scrollTop - page.clientHeight < 80;
}

// Takes one chunk of an answer into its message and what shows it.
function take(chunk, message, shown) {
  if (chunk.usage) message.usage = chunk.usage;
  const choice = chunk.choices[0];
  if (!choice) return;
  if (choice.delta.reasoning_content) {
    message.reasoning_content = (message.reasoning_content ?? "") + choice.delta.reasoning_content;
  }
  message.content += choice.delta.content ?? "";
  for (const round of choice.speculative ?? []) {
    message.rounds.push(round);
    shown.round(round);
  }
  if (choice.finish_reason === "length") message.note = "cut off at the most tokens";
}

async function ask(text) {
  messages.push({ role: "user", content: text });
  const asked = request();
  const message = { role: "assistant", content: "", rounds: [] };
  messages.push(message);
  abort = new AbortController();
  get("send").disabled = true;
  get("stop").disabled = false;
  say("answering…");
  show();
  const shown = new Message(message);
  get("messages").lastChild.replaceWith(shown.root);
  shown.root.scrollIntoView({ block: "nearest" });
  try {
    for await (const chunk of answer(asked, get("key").value, abort.signal)) {
      const follows = isAtEnd();
      take(chunk, message, shown);
      showPanels(message);
      if (follows) shown.root.scrollIntoView({ block: "end" });
    }
    say(`answered in ${message.usage.completion_tokens} tokens`);
  } catch (error) {
    const stopped = error.name === "AbortError";
    const told = stopped ? "stopped"
      : error instanceof Refused ? error.message : `the server cannot be reached (${error.message})`;
    say(told, !stopped);
    message.note = told;
    if (messages.includes(message) && !message.rounds.length) {
      messages = messages.slice(0, -2); // nothing was answered: the message may be sent again
      get("text").value ||= text;
    }
  }
  abort = null;
  get("send").disabled = false;
  get("stop").disabled = true;
  show();
  keep();
}

function send() {
  const text = get("text").value;
  if (!text.trim() || abort) return;
  get("text").value = "";
  ask(text);
}

async function showModels() {
  const chosen = get("model").value;
  try {
    const names = await models(get("key").value);
    get("model").replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
    get("model-shown").textContent = get("model").value;
    if (get("status").classList.contains("error")) say("");
  } catch (error) {
    say(error instanceof Refused ? `${error.message} (Settings has a field for it)` : error.message, true);
  }
  showCurl();
}

get("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
get("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") abort?.abort();
});
get("stop").addEventListener("click", () => abort?.abort());
get("new").addEventListener("click", () => {
  abort?.abort();
  messages = [];
  show();
  keep();
  say("a new conversation");
  get("text").focus();
});
get("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(get("curl").textContent);
    say("copied");
  } catch {
    getSelection().selectAllChildren(get("curl")); // where a browser allows no copying, as over http
    say("selected: copy it with the keyboard");
  }
});
get("key").addEventListener("change", showModels);
get("model").addEventListener("change", () => {
  get("model-shown").textContent = get("model").value;
});
get("marks").addEventListener("change", () => {
  document.body.classList.toggle("drawn", get("marks").checked);
});
document.addEventListener("input", showCurl);
addEventListener("pagehide", keep);

recall();
document.body.classList.toggle("drawn", get("marks").checked);
show();
showModels();
