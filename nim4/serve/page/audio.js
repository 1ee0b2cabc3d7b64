// Where samples come from: a microphone or a recording, always 16-bit, mono, 16 kHz.

import { RATE_HZ, toPcm } from "./resampler.js";

const PIECE_SAMPLES = 1600; // of a recording, at once
const WAKE_MS = 40;
const GONE = "The microphone is gone.";
export const AS_SPOKEN_S = 0.2; // how far ahead a recording is sent that is paced as it was spoken: what timers are late

/** Something that people are told in one line. */
export class Trouble extends Error {}

/**
 * Opens the microphone.
 * @param {(samples: Int16Array) => void} onSamples gets 40 ms at a time
 * @param {(why: string) => void} onGone is called when it was unplugged or taken away
 * @returns {Promise<() => void>} closes it
 */
export async function openMicrophone(onSamples, onGone) {
  if (!navigator.mediaDevices) throw new Trouble("Browsers give a microphone only to pages from https:// or from this machine.");
  const context = new AudioContext();
  const close = (stream) => {
    stream?.getTracks().forEach((track) => track.stop());
    if (context.state !== "closed") context.close();
  };
  let stream;
  try {
    const raw = { echoCancellation: false, noiseSuppression: false, autoGainControl: true }; // quiet microphones are common
    stream = await navigator.mediaDevices.getUserMedia({ audio: raw });
    await context.audioWorklet.addModule(new URL("microphone-worklet.js", import.meta.url));
    await context.resume();
  } catch (error) {
    close(stream);
    throw new Trouble(whyNoMicrophone(error));
  }
  const [track] = stream.getAudioTracks();
  if (track.readyState === "ended") {
    close(stream); // unplugged meanwhile, of which no event tells any more
    throw new Trouble(GONE);
  }
  const worklet = new AudioWorkletNode(context, "microphone", { numberOfOutputs: 0 });
  worklet.port.onmessage = ({ data }) => onSamples(data);
  context.createMediaStreamSource(stream).connect(worklet);
  track.onended = () => onGone(GONE);
  return () => {
    worklet.port.onmessage = null;
    close(stream);
  };
}

function whyNoMicrophone(error) {
  const known = {
    NotAllowedError: "The microphone was not allowed: allow it for this page in the browser's settings.",
    NotFoundError: "No microphone was found.",
    NotReadableError: "The microphone is used by another program, or broken.",
  };
  return known[error.name] ?? `The microphone cannot be used: ${error.message}`;
}

/** @param {File} file @returns {Promise<Int16Array>} its sound, channels averaged */
export async function readRecording(file) {
  let sound;
  try {
    sound = await new OfflineAudioContext(1, 1, RATE_HZ).decodeAudioData(await file.arrayBuffer()); // it resamples, too
  } catch {
    throw new Trouble(`${file.name} holds no sound that this browser can read.`);
  }
  const mono = new Float32Array(sound.length);
  for (let channel = 0; channel < sound.numberOfChannels; channel++) {
    sound.getChannelData(channel).forEach((sample, i) => (mono[i] += sample / sound.numberOfChannels));
  }
  return toPcm(mono);
}

/**
 * Sends a recording no more than some seconds ahead of the clock, counted as the server does: time that was lost is not caught up.
 * @param {(samples: Int16Array) => void} send
 * @param {number} aheadS
 * @param {AbortSignal} signal ends it
 */
export async function play(samples, send, aheadS, signal) {
  let ahead = 0;
  let before = performance.now();
  for (let start = 0; start < samples.length && !signal.aborted;) {
    const now = performance.now();
    ahead = Math.max(ahead - (now - before) / 1000, 0);
    before = now;
    for (; start < samples.length && ahead + PIECE_SAMPLES / RATE_HZ <= aheadS; start += PIECE_SAMPLES) {
      send(samples.subarray(start, start + PIECE_SAMPLES));
      ahead += PIECE_SAMPLES / RATE_HZ;
    }
    await new Promise((done) => setTimeout(done, WAKE_MS));
  }
}
