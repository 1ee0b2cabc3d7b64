// The page: what buttons do, and which state it is in: asking -> ready -> starting -> listening -> finishing -> ready.

import { AS_SPOKEN_S, openMicrophone, play, readRecording, Trouble } from "./audio.js";
import { LatencyPlot } from "./plot.js";
import { askAbout, canBeKey, EventLog, Stream, whyClosed } from "./stream.js";
import { Transcript } from "./transcript.js";

const SAFETY_S = 2; // so much less than the server's limit, when a recording is sent as fast as it allows
const SPLIT = /[,，、\n]/;

const at = (id) => document.getElementById(id);
const log = new EventLog();
const transcript = new Transcript(at("utterances"), at("announcer"));
const plot = new LatencyPlot(at("plot"), at("latency-summary"));

let about = null; // what the server says about itself
let key = "";
let stream = null;
let source = null; // { button, stop() }: what is heard
let again = connect; // what "Reconnect" does

// ------------------------------------------------------------------------------------------------------------- what is shown

const idleNames = new Map([at("microphone"), at("file")].map((button) => [button, button.textContent]));

function setState(state, words) {
  document.body.dataset.state = state;
  if (at("status").textContent !== words) at("status").textContent = words;
  for (const [button, name] of idleNames) {
    const own = source?.button === button;
    button.textContent = own && state === "listening" ? "Stop" : own && state === "finishing" ? "Finishing" : name;
    button.ariaDisabled = String(!(state === "ready" || (own && state === "listening")));
  }
}

function showTrouble(message, retry = null) {
  at("trouble").replaceChildren(...(message ? [message] : []));
  at("reconnect").hidden = !retry;
  if (retry) again = retry;
}

function showLog() {
  at("empty").hidden = at("utterances").childElementCount > 0;
  at("download").ariaDisabled = String(log.size === 0);
  at("clear").ariaDisabled = String(log.size === 0 || stream !== null);
}

function showLevel(samples) {
  const peak = samples.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0) / 32768;
  at("level").firstElementChild.style.transform = `scaleX(${Math.min(Math.sqrt(peak), 1)})`;
}

// ----------------------------------------------------------------------------------------------------------------- the server

/** Asks the server what it offers; its answer tells whether it is there and lets us in. Gives whether it does. */
async function connect() {
  showTrouble("");
  setState("asking", "Connecting");
  const answer = await askAbout(key);
  if (answer.about) {
    about = answer.about;
    at("key-form").hidden = true;
    offer(about);
    setState("ready", "Ready");
    return true;
  }
  about = null;
  if (answer.status === 401) {
    at("key-form").hidden = false;
    setState("locked", "API key needed");
    showTrouble(key ? "The server does not accept this API key." : "");
    at("key").focus();
  } else {
    setState("failed", "Not connected");
    showTrouble(answer.message, connect);
  }
  return false;
}

function offer({ indexes }) {
  const chosen = at("index").value;
  at("index").replaceChildren(new Option("no index", ""), ...indexes.map((name) => new Option(name, name)));
  at("index").value = indexes.includes(chosen) ? chosen : "";
  at("index-field").hidden = indexes.length === 0;
  showHotwords();
}

const hotwords = () =>
  [
    ...new Set(
      at("hotwords")
        .value.split(SPLIT)
        .map((word) => word.trim()),
    ),
  ].filter(Boolean);

function showHotwords() {
  at("hotwords-count").textContent = about ? `${hotwords().length} of at most ${about.max_hotwords}` : "";
}

const names = () => ({ hotwords: hotwords(), index: at("index").value || null });

// ---------------------------------------------------------------------------------------------------------------- one session

/**
 * Hears a source until it ends or is stopped.
 * @param {HTMLButtonElement} button that began it, and stops it
 * @param {(hear: (samples: Int16Array) => void, fail: (message: string) => void, connected: Promise<void>) =>
 *   Promise<{stop(): void, ended?: Promise<void>}>} open
 */
async function listen(button, open) {
  if (document.body.dataset.state !== "ready" && !(await connect())) return;
  const retry = () => listen(button, open);
  again = retry;
  showTrouble("");
  setState("starting", "Starting");
  const waiting = []; // what is heard before there is a stream
  const hear = (samples) => {
    showLevel(samples);
    if (stream) stream.hear(samples);
    else waiting.push(samples);
  };
  const connected = Promise.withResolvers();
  const fail = (message) => {
    showTrouble(message, retry);
    finish();
  };
  let opened;
  try {
    opened = await open(hear, fail, connected.promise);
  } catch (error) {
    setState("ready", "Ready");
    if (!(error instanceof Trouble)) throw error;
    return showTrouble(error.message);
  }
  const own = { button, ...opened };
  source = own;
  own.ended?.then(() => source === own && finish());
  let given = []; // hotwords by hand, as the server has them
  const take = (event) => (given = took(event, given));
  stream = new Stream(key, log, take, connected.resolve, (event, wasOpen) => closed(event, wasOpen, retry));
  stream.update({ turn_detection: at("pauses").checked ? { type: "server_vad" } : null });
  stream.update(names()); // in a message of its own: people may write what the server refuses
  waiting.forEach((samples) => stream.hear(samples));
  setState("listening", "Listening");
  showLog();
}

/** What an event of the server changes. Gives the hotwords by hand that hold from now on. */
function took(event, given) {
  if (event.type === "partial" || event.type === "final") {
    transcript[event.type](event, given);
    plot.add(event.type, event.lag_ms);
  } else if (event.type === "input_audio_buffer.speech_started") {
    transcript.begin(event.item_id, event.audio_start_ms / 1000, given);
  } else if (event.type === "error") {
    showTrouble(event.error.message);
  }
  showLog();
  return event.type === "session.updated" ? event.session.hotwords : given;
}

/** No more audio: the server writes the last text, then closes. */
function finish() {
  if (document.body.dataset.state !== "listening") return;
  source.stop();
  setState("finishing", "Finishing");
  stream.stop();
}

async function closed(event, wasOpen, retry) {
  source?.stop();
  [source, stream] = [null, null];
  transcript.end();
  showLevel([0]);
  showLog();
  setState("ready", "Ready");
  if (event.code === 1000) return;
  const why = whyClosed(event);
  if (wasOpen && event.code !== 1006) return showTrouble(why, retry);
  // A browser does not say why a stream was refused, or whether the server is still there: ask.
  if (!(await connect())) {
    again = retry;
  } else if (wasOpen) showTrouble(why, retry);
  else showTrouble(about.free_streams ? "The server refused the stream." : "All streams of the server are in use: try again later.", retry);
}

// ------------------------------------------------------------------------------------------------------------------- controls

function onClick(id, act) {
  at(id).addEventListener("click", () => at(id).ariaDisabled === "true" || act());
}

async function microphone(hear, fail) {
  return { stop: await openMicrophone(hear, fail) };
}

function recording(file) {
  return async (hear, _, connected) => {
    const samples = await readRecording(file);
    const aheadS = at("fast").checked ? about.max_ahead_s - SAFETY_S : AS_SPOKEN_S;
    const stopping = new AbortController();
    // Only then: what had waited for the connection would all come at once, and be too far ahead.
    const ended = connected.then(() => play(samples, hear, aheadS, stopping.signal));
    return { stop: () => stopping.abort(), ended };
  };
}

onClick("microphone", () => (stream ? finish() : listen(at("microphone"), microphone)));
onClick("file", () => (stream ? finish() : at("file-input").click()));
at("file-input").addEventListener("change", ({ target }) => {
  const [file] = target.files;
  target.value = ""; // so that the same file can be chosen again
  if (file) listen(at("file"), recording(file));
});
onClick("reconnect", () => {
  at("microphone").focus(); // this button goes away
  again();
});
onClick("download", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([log.toJsonLines()], { type: "application/x-ndjson" }));
  link.download = `nim4-events-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.jsonl`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
});
onClick("clear", () => {
  [log, transcript, plot].forEach((part) => part.clear());
  showLog();
});
at("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = at("key").value.trim();
  if (!canBeKey(key)) showTrouble("This cannot be an API key: it has characters that a browser cannot send.");
  else if (await connect()) at("microphone").focus();
});
at("hotwords").addEventListener("input", showHotwords);
for (const id of ["hotwords", "index"]) at(id).addEventListener("change", () => stream?.update(names()));

at("settings").open = matchMedia("(min-width: 60rem)").matches; // on a phone the transcript comes first
connect();
