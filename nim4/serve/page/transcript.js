// The utterances: one row each, whose text is replaced until it is final.

import { compare } from "./compare.js";

/** A new element with text or children. */
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
const languageOf = (text) => (/\p{Script=Han}/u.test(text) ? "zh" : "en");

export class Transcript {
  #list;
  #announcer;
  #open = new Map(); // item -> { row, given, before: its last partial text }
  #isNew = true; // no row of this stream yet

  /**
   * @param {HTMLElement} list of rows
   * @param {HTMLElement} announcer what screen readers read out by themselves: final texts, nothing that can still change
   */
  constructor(list, announcer) {
    [this.#list, this.#announcer] = [list, announcer];
  }

  /**
   * Somebody has begun to speak.
   * @param {string[]} given hotwords by hand that hold for this utterance
   */
  begin(item, beginS, given) {
    if (this.#open.has(item)) return;
    const row = make("li", "utterance", make("time", "", clock(beginS)), make("div", "said"));
    row.dataset.state = "partial";
    this.#open.set(item, { row, given, before: "" });
    this.#keepEndInView(() => this.#list.append(row), this.#isNew);
    this.#isNew = false;
  }

  /** @param {object} event partial, as stream.js gives it */
  partial(event, given) {
    this.begin(event.item_id, event.begin_s, given);
    const utterance = this.#open.get(event.item_id);
    utterance.before = event.text;
    const characters = Array.from(event.text); // `settled` counts characters, not UTF-16 units
    const [settled, changing] = [characters.slice(0, event.settled), characters.slice(event.settled)].map((part) => part.join(""));
    const text = make("p", "text", make("span", "settled", settled), make("span", "changing", changing));
    text.lang = languageOf(event.text);
    this.#show(utterance.row, text, event.text ? hintsOf(event.hints, utterance.given) : null);
  }

  /** The text of the second pass, and what it changed. */
  final(event, given) {
    this.begin(event.item_id, event.begin_s, given);
    const { row, before, given: own } = this.#open.get(event.item_id);
    this.#open.delete(event.item_id);
    row.dataset.state = "final";
    const parts = compare(before, event.text);
    const text = make("p", "text", ...parts.map(({ kind, now }) => (before && kind === "changed" && now ? make("mark", "", now) : now)));
    text.lang = languageOf(event.text);
    if (!event.text) text.append(make("span", "aside", "Nothing was understood."));
    this.#show(row, text, before ? noteOf(parts) : null, hintsOf(event.hints, own));
    const spoken = make("p", "", event.text);
    spoken.lang = text.lang;
    this.#announcer.replaceChildren(spoken);
  }

  /** The stream has ended: rows without a final text get none. */
  end() {
    for (const { row, before } of this.#open.values()) {
      row.dataset.state = "lost";
      if (before) row.querySelector(".said").append(make("p", "aside note", "The stream ended before the second pass."));
      else row.remove();
    }
    this.#open.clear();
    this.#isNew = true;
  }

  clear() {
    this.#list.replaceChildren();
    this.#announcer.replaceChildren();
  }

  #show(row, ...parts) {
    this.#keepEndInView(() => row.querySelector(".said").replaceChildren(...parts.filter(Boolean)));
  }

  /** Scrolls on with the text, unless its reader has scrolled away. */
  #keepEndInView(change, always = false) {
    const end = this.#list.getBoundingClientRect().bottom;
    change();
    if (always || (end > 0 && end <= innerHeight + 8)) this.#list.lastElementChild?.scrollIntoView({ block: "nearest" });
  }
}

/** What the second pass changed, in words. */
function noteOf(parts) {
  const changes = parts.filter(({ kind, was, now }) => kind === "changed" && was.trim() + now.trim());
  const note = make("p", "aside note", changes.length ? "Second pass: " : "Second pass: no change");
  changes.forEach(({ was, now }, i) => {
    const [old, fresh] = [was.trim(), now.trim()];
    if (i > 0) note.append("; ");
    if (old) note.append(make("del", "", old), fresh ? " → " : " removed");
    if (fresh) note.append(make("ins", "", fresh), old ? "" : " added");
  });
  return note;
}

function hintsOf(hints, given) {
  if (hints.length === 0) return null;
  const list = make("ul", "hints", ...hints.map((hint) => hintOf(hint, !given.includes(hint))));
  list.ariaLabel = "Hints";
  return list;
}

function hintOf(hint, isFound) {
  const item = make("li", isFound ? "found" : "", hint);
  if (isFound) item.append(make("span", "aside", " from the index"));
  return item;
}
