// The page: what is chosen, and the clips of one page of it.
"use strict";

const PER_PAGE = 20;
const at = (id) => document.getElementById(id);
const filters = at("filters");
let profile = 0;
let page = 0;
let places = [];
let turn = 0; // so that of two views the later one stays, whichever comes first

function start() {
  if (report === null) {
    tell("data/report.js cannot be read: keep the page's whole folder together, or run stage 13 again");
    return;
  }
  document.title = `${report.title}: recognisers compared`;
  document.querySelector("h1").textContent = report.title;
  report.profiles.forEach(addProfile);
  const languages = [...new Set(report.columns.language.map((language) => language ?? "unknown"))];
  fill("set", [["", "all"], ...report.sets.map((name) => [name, name])]);
  fill("language", [["", "all"], ...languages.map((name) => [name, name])]);
  fill("system", [["", "any"], ...report.systems.map((name) => [name, name])]);
  fill("against", report.systems.map((name) => [name, name]));
  const hasTwins = Object.keys(report.twins).length > 0;
  filters.elements.changed.disabled = !hasTwins;
  const help = Object.entries(report.twins).map(([name, twin]) => `${name} against ${twin}`);
  filters.elements.changed.title = hasTwins ? help.join(", ") : "no system was decoded both with and without hotwords";
  at("notes").append(...report.notes.map((note) => make("p", "quiet", note)));
  filters.addEventListener("change", () => refresh());
  filters.addEventListener("submit", (event) => event.preventDefault());
  for (const button of document.querySelectorAll(".pager button")) button.onclick = () => turnPage(Number(button.dataset.step));
  at("reported-tables").addEventListener("toggle", () => showReported(at("reported-tables")), { once: true });
  showTables(at("tables"), profile);
  void refresh();
}

function tell(words) {
  at("trouble").textContent = words;
}

function addProfile(name, number) {
  const input = make("input");
  Object.assign(input, { type: "radio", name: "profile", checked: number === 0 });
  input.onchange = () => {
    profile = number;
    showTables(at("tables"), profile);
    void refresh(page);
  };
  at("profiles").append(make("label", "", input, name));
}

function fill(name, options) {
  filters.elements[name].replaceChildren(...options.map(([value, text]) => new Option(text, value)));
}

function viewNow() {
  const { set, language, system, against, order, hallucinated, changed, written } = filters.elements;
  return {
    profile,
    set: set.value,
    language: language.value,
    system: system.value,
    against: against.value,
    order: order.value,
    hallucinated: hallucinated.checked,
    changed: changed.checked,
    written: written.checked,
  };
}

function turnPage(step) {
  void refresh(page + step);
  at("clips").scrollIntoView();
}

/** Chooses again, and shows a page of it, the first unless told otherwise. */
async function refresh(wanted = 0) {
  const own = ++turn;
  const view = viewNow();
  const compares = ["improved", "worsened"].includes(view.order);
  filters.elements.against.disabled = !compares;
  places = choose(view);
  const numPages = Math.max(Math.ceil(places.length / PER_PAGE), 1);
  page = Math.min(Math.max(wanted, 0), numPages - 1);
  const shown = places.slice(page * PER_PAGE, (page + 1) * PER_PAGE);
  let clips;
  try {
    clips = await Promise.all(shown.map(clipAt));
  } catch (error) {
    if (own === turn) tell(error.message);
    return;
  }
  if (own !== turn) return;
  tell("");
  for (const audio of document.querySelectorAll("audio")) audio.pause(); // one that is taken off the page would go on
  at("list").replaceChildren(...clips.map((clip) => clipItem(clip, view)));
  at("list").start = page * PER_PAGE + 1;
  const range = `${page * PER_PAGE + 1} to ${page * PER_PAGE + shown.length} of ${places.length}`;
  at("count").textContent = places.length === 0 ? "No clip is like that" : range;
  for (const button of document.querySelectorAll(".pager button")) {
    button.disabled = Number(button.dataset.step) < 0 ? page === 0 : page === numPages - 1;
  }
}

start();
