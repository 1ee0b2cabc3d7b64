// Runs in the audio thread: the microphone's samples, averaged over channels, as 16-bit samples at 16 kHz in pieces of 40 ms.

import { Resampler, toPcm } from "./resampler.js";

const PIECE_SAMPLES = 640;

class Microphone extends AudioWorkletProcessor {
  resampler = new Resampler(sampleRate);
  piece = new Int16Array(PIECE_SAMPLES);
  filled = 0;

  process([channels]) {
    if (channels.length === 0) return true; // it has not begun yet
    const mono = channels[0].map((_, i) => channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length);
    for (const sample of toPcm(this.resampler.push(mono))) {
      this.piece[this.filled++] = sample;
      if (this.filled === PIECE_SAMPLES) {
        this.port.postMessage(this.piece);
        this.filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("microphone", Microphone);
