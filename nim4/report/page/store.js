// What the page knows: the report, which comes first, and the clips, which come in files when they are looked at.
// Pages from disk may load scripts and nothing else, so each file of data is a call of one of the two functions that receive.
"use strict";

let report = null;
const arrived = new Map(); // number of a file -> its clips
const asked = new Map(); // number of a file -> promise of its clips

function receiveReport(value) {
  report = value;
}

function receiveClips(number, clips) {
  arrived.set(number, clips);
}

function clipsOfFile(number) {
  if (!asked.has(number)) asked.set(number, new Promise((resolve, reject) => loadFile(number, resolve, reject)));
  return asked.get(number);
}

function loadFile(number, resolve, reject) {
  const script = document.createElement("script");
  const fail = () => {
    asked.delete(number);
    reject(new Error(`data/clips-${number}.js cannot be read: keep the page's whole folder together, or run stage 13 again`));
  };
  script.src = `data/clips-${number}.js`;
  script.onload = () => (arrived.has(number) ? resolve(arrived.get(number)) : fail());
  script.onerror = fail;
  document.head.append(script);
}

/** The clip at a place of the report's columns. */
async function clipAt(place) {
  return (await clipsOfFile(Math.floor(place / report.perFile)))[place % report.perFile];
}

/**
 * The places of the clips that a view asks for, in its order.
 * @param {{profile: number, set: string, language: string, system: string, against: string, order: string, hallucinated: boolean, changed: boolean}} view
 *   `system` "" means any of them.
 */
function choose(view) {
  const { set, language, units, errors, hallucinated, changed } = report.columns;
  const [ofProfile, ofUnits] = [errors[view.profile], units[view.profile]];
  const systems = view.system === "" ? report.systems.map((_, i) => i) : [report.systems.indexOf(view.system)];
  const against = ofProfile[report.systems.indexOf(view.against)];
  const allOf = (lists) => new Set(systems.flatMap((i) => lists[i]));
  const madeUp = view.hallucinated && allOf(hallucinated[view.profile]);
  const different = view.changed && allOf(report.systems.map((name) => changed[name]));
  const places = [];
  for (let place = 0; place < set.length; place++) {
    if (view.set !== "" && report.sets[set[place]] !== view.set) continue;
    if (view.language !== "" && (language[place] ?? "unknown") !== view.language) continue;
    if (systems.every((i) => ofProfile[i][place] < 0)) continue;
    if ((madeUp && !madeUp.has(place)) || (different && !different.has(place))) continue;
    places.push(place);
  }
  if (view.order === "listed") return places;
  const scores = new Map();
  for (const place of places) {
    const own = systems.map((i) => ofProfile[i][place]).filter((count) => count >= 0);
    if (view.order === "worst") scores.set(place, rateOf(Math.max(...own), ofUnits[place]));
    else if (against[place] < 0) scores.set(place, 0);
    else if (view.order === "improved") scores.set(place, against[place] - Math.min(...own));
    else scores.set(place, Math.max(...own) - against[place]);
  }
  return places.filter((place) => scores.get(place) > 0).sort((a, b) => compareNumbers(scores.get(b), scores.get(a)) || a - b);
}

function compareNumbers(a, b) {
  return a === b ? 0 : a - b; // two infinite ones are alike
}

/** Errors in percent of the reference's units; where nothing is said, any is infinitely many. */
function rateOf(errors, units) {
  return units > 0 ? (100 * errors) / units : errors > 0 ? Infinity : 0;
}

/** An element with a class, and text or elements in it: text is never anything else. */
function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter((child) => child !== null));
  return element;
}

function shape(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
