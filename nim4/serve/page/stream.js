// The protocol: one stream of the server's /v1/realtime (docs/serving.md), and the log of what was said on all of them.

import { RATE_HZ } from "./resampler.js";

const KEY_PROTOCOL = "openai-insecure-api-key.";
const CLOSED = {
  1001: "The server is going away.",
  1006: "The connection to the server was lost.",
  1009: "The server refused a message that was too long.",
  1011: "The server failed.",
  1013: "The server has too much to do: try again later.",
  4408: "The server heard nothing for too long.",
  4409: "This page took the server's messages too slowly.",
  4413: "A session lasts an hour at most: this one is over.",
  4429: "Audio was sent faster than the server allows.",
};

/** Whether a browser can send this key, which goes where only some signs are allowed: RFC 9110's token. */
export const canBeKey = (key) => /^[\w!#$%&'*+.^`|~-]+$/.test(key);

/** What people are told about a stream that closed; "" if it ended as it should. */
export function whyClosed({ code, reason }) {
  if (code === 1000) return "";
  return CLOSED[code] ?? `The server closed the stream (${code}${reason && ": " + reason}).`;
}

/**
 * What the server says about itself.
 * @returns {Promise<{about?: object, status: number, message: string}>} status 0: it cannot be reached
 */
export async function askAbout(key) {
  try {
    const headers = key ? { authorization: `Bearer ${key}` } : {};
    const answer = await fetch(new URL("v1/about", document.baseURI), { headers, cache: "no-store" });
    const body = await answer.json();
    return answer.ok ? { about: body, status: answer.status, message: "" } : { status: answer.status, message: body.error.message };
  } catch {
    return { status: 0, message: "The server cannot be reached." };
  }
}

const MAX_ENTRIES = 100_000; // about an hour of a microphone; a page may stay open for days

/** What went over the streams of this page, a line for each message; of too many the oldest are dropped, and the first line says how many. */
export class EventLog {
  #entries = [];
  #dropped = 0;
  #start = performance.now();

  add(from, message) {
    this.#entries.push({ at_ms: Math.round(10 * (performance.now() - this.#start)) / 10, from, ...message });
    if (this.#entries.length > MAX_ENTRIES) this.#dropped += this.#entries.splice(0, MAX_ENTRIES / 10).length;
  }

  get size() {
    return this.#entries.length;
  }

  clear() {
    this.#entries = [];
    this.#dropped = 0;
    this.#start = performance.now();
  }

  toJsonLines() {
    const missing = this.#dropped ? [{ at_ms: 0, from: "page", type: "dropped", num_messages: this.#dropped }] : [];
    return [...missing, ...this.#entries].map((entry) => JSON.stringify(entry) + "\n").join("");
  }
}

/**
 * One stream. Events of texts get two more fields: `begin_s`, where the utterance begins in the stream, and `lag_ms`, from when the audio
 * that a text has heard had been sent to when the text came.
 */
export class Stream {
  #socket;
  #log;
  #waiting = []; // until the connection is open
  #sent = [{ samples: 0, at: performance.now() }]; // after so many samples, when
  #begins = new Map(); // item -> seconds
  #committedS = 0; // the utterances before the present one

  /**
   * @param {string} key "" = none
   * @param {(event: object) => void} onEvent
   * @param {() => void} onOpen
   * @param {(event: CloseEvent, opened: boolean) => void} onClose
   */
  constructor(key, log, onEvent, onOpen, onClose) {
    const url = new URL("v1/realtime", document.baseURI);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    this.#socket = new WebSocket(url, key ? ["realtime", KEY_PROTOCOL + key] : ["realtime"]);
    this.#log = log;
    this.#socket.binaryType = "arraybuffer";
    let opened = false;
    this.#socket.onopen = () => {
      opened = true;
      this.#waiting.splice(0).forEach((send) => send());
      onOpen();
    };
    this.#socket.onmessage = ({ data }) => onEvent(this.#received(JSON.parse(data)));
    this.#socket.onclose = (event) => {
      log.add("page", { type: "closed", code: event.code, reason: event.reason });
      onClose(event, opened);
    };
  }

  /** @param {object} session settings that change, see docs/serving.md */
  update(session) {
    this.#tell({ type: "session.update", session });
  }

  /** Asks for the rest of the texts, and for the end. */
  stop() {
    this.#tell({ type: "stop" });
  }

  /** @param {Int16Array} samples */
  hear(samples) {
    this.#whenOpen(() => {
      this.#socket.send(samples);
      this.#sent.push({ samples: this.#sent.at(-1).samples + samples.length, at: performance.now() });
      this.#log.add("page", { type: "audio", num_samples: samples.length });
    });
  }

  get sentS() {
    return this.#sent.at(-1).samples / RATE_HZ;
  }

  #tell(message) {
    this.#whenOpen(() => {
      this.#socket.send(JSON.stringify(message));
      this.#log.add("page", message);
    });
  }

  #whenOpen(send) {
    if (this.#socket.readyState === WebSocket.CONNECTING) this.#waiting.push(send);
    else if (this.#socket.readyState === WebSocket.OPEN) send();
  }

  #received(event) {
    if (event.type === "input_audio_buffer.speech_started") this.#begins.set(event.item_id, event.audio_start_ms / 1000);
    if (event.type === "partial" || event.type === "final") {
      if (!this.#begins.has(event.item_id)) this.#begins.set(event.item_id, this.#committedS);
      event.begin_s = this.#begins.get(event.item_id);
      const heardS = event.begin_s + event.audio_s;
      event.lag_ms = Math.round(10 * (performance.now() - this.#sentAt(heardS))) / 10;
      if (event.type === "final") this.#committedS = heardS;
    }
    this.#log.add("server", event);
    return event;
  }

  /** When the audio up to some second of the stream had been sent. */
  #sentAt(seconds) {
    const samples = Math.round(seconds * RATE_HZ);
    let [low, high] = [0, this.#sent.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#sent[middle].samples < samples) low = middle + 1;
      else high = middle;
    }
    return this.#sent[low].at;
  }
}
