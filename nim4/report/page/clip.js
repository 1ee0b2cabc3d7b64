// One clip: its audio, what was said, and what each system made of it.
"use strict";

const HAN = /\p{Script=Han}/u;
const PEAK_HEIGHT = 99;

function clipItem(clip, view) {
  const facts = [clip.set, clip.language, clip.speaker && `speaker ${clip.speaker}`, clip.seconds > 0 && `${clip.seconds.toFixed(1)} s`];
  const item = make("li", "clip", make("h3", "", clip.id), make("p", "quiet facts", facts.filter(Boolean).join(" · ")));
  const audio = clip.audio ? playerOf(clip) : null;
  item.append(audio ? soundOf(clip, audio) : make("p", "mark", `No audio: ${clip.noAudio}`));
  const list = make("dl", "texts", make("dt", "", "reference"), make("dd", "reference", clip.ref || nothing("nothing is said")));
  clip.systems.forEach((row, i) => {
    if (row) list.append(...systemRow(clip, row, report.systems[i], view, audio));
  });
  item.append(list);
  return item;
}

function nothing(words) {
  return make("em", "quiet", words);
}

function playerOf(clip) {
  const audio = make("audio");
  Object.assign(audio, { controls: true, preload: "none", src: clip.audio });
  audio.setAttribute("aria-label", `Audio of ${clip.id}`);
  audio.addEventListener("play", () => {
    for (const other of document.querySelectorAll("audio")) if (other !== audio) other.pause();
  });
  return audio;
}

/** Waveform and player; a file that has gone is told in their place. */
function soundOf(clip, audio) {
  const wave = waveOf(clip);
  const sound = make("div", "sound", wave, audio);
  const duration = () => clip.seconds || audio.duration;
  audio.addEventListener("timeupdate", () => {
    const part = Math.min(Math.max((audio.currentTime - startOf(audio)) / duration(), 0), 1);
    wave.style.setProperty("--played", `${(100 * part).toFixed(1)}%`);
  });
  audio.addEventListener("error", () => sound.append(make("p", "mark", `Audio missing: ${clip.audio} cannot be played`)), { once: true });
  wave.addEventListener("click", (event) => {
    const box = wave.getBoundingClientRect();
    audio.currentTime = startOf(audio) + (duration() * (event.clientX - box.left)) / box.width;
    void audio.play().catch(() => {});
  });
  return sound;
}

function waveOf(clip) {
  const high = Math.max(...clip.peaks, 1);
  const bars = clip.peaks.map((peak, i) => {
    const half = Math.max((PEAK_HEIGHT * peak) / high, 1) / 2;
    return `M${i + 0.5} ${(50 - half).toFixed(1)}V${(50 + half).toFixed(1)}`;
  });
  const picture = shape("svg", { viewBox: `0 0 ${clip.peaks.length} 100`, preserveAspectRatio: "none", class: "wave", "aria-hidden": "true" });
  for (const kind of ["whole", "played"]) picture.append(shape("path", { d: bars.join(""), class: kind }));
  return picture;
}

/** The name, and what belongs to it. */
function systemRow(clip, row, name, view, audio) {
  const [errors, units, pairs] = row.scores[view.profile];
  const term = make("dt", view.system === name ? "chosen" : "", name, make("span", errors ? "rate wrong" : "rate", rateText(errors, units)));
  const place = make("dd", view.system === name ? "chosen" : "");
  if (row.missing && row.missing !== "empty") place.append(make("p", "mark", `No text: ${row.missing}`));
  else if (row.missing) place.append(make("p", "mark", "Empty text"));
  else place.append(make("p", "aligned", ...(pairs.length ? alignedParts(pairs) : [nothing("no text, and nothing is said")])));
  if (view.written && row.text) place.append(make("p", "written", row.text));
  if (row.hints) place.append(hintsOf(row.hints, clip.ref));
  if (row.shown?.length) place.append(replayButton(clip, row, name, audio));
  return [term, place];
}

function rateText(errors, units) {
  if (units === 0) return errors ? `${errors} too many` : "0 errors";
  return `${rateOf(errors, units).toFixed(1)} % (${errors} of ${units})`;
}

function hintsOf(hints, ref) {
  const line = make("p", "quiet hints", hints.length ? "Hotwords: " : "Hotwords: none found");
  hints.forEach((hint, i) => line.append(i ? ", " : "", ref.includes(hint) ? make("mark", "", hint) : hint));
  return line;
}

function replayButton(clip, row, name, audio) {
  const button = make("button", "small", "Replay");
  button.type = "button";
  button.setAttribute("aria-label", `Replay ${name} on ${clip.id}`);
  button.onclick = () => {
    const replay = replayOf(clip, row.shown, audio);
    button.replaceWith(replay);
    replay.querySelector("button").focus();
  };
  return button;
}

/** Units that agree as text; a run of errors as what the reference has, struck, and what the system has, underlined. */
function alignedParts(pairs) {
  const parts = [];
  let last = ""; // unit before
  let run = null;
  const close = () => {
    if (!run) return;
    for (const [tag, units] of [["del", run.ref], ["ins", run.hyp]]) {
      if (!units.length) continue;
      parts.push(between(last, units[0]), make(tag, "", units.reduce((text, unit, i) => text + (i ? between(units[i - 1], unit) : "") + unit, "")));
      last = units.at(-1);
    }
    run = null;
  };
  for (const pair of pairs) {
    if (typeof pair === "string") {
      close();
      parts.push(between(last, pair), pair);
      last = pair;
    } else {
      run ??= { ref: [], hyp: [] };
      if (pair[0]) run.ref.push(pair[0]);
      if (pair[1]) run.hyp.push(pair[1]);
    }
  }
  close();
  return joined(parts);
}

/** A blank between two units, unless both are Chinese. */
function between(a, b) {
  return !a || (HAN.test(a) && HAN.test(b)) ? "" : " ";
}

/** Neighbouring texts as one, so that a clip has few nodes. */
function joined(parts) {
  const found = [];
  for (const part of parts) {
    if (typeof part === "string" && typeof found.at(-1) === "string") found[found.length - 1] += part;
    else if (part !== "") found.push(part);
  }
  return found;
}
