// Audio of any rate to 16 kHz, piece by piece. No names of a window or a worklet are used here: both load it.

export const RATE_HZ = 16_000;
const ZERO_CROSSINGS = 16; // of the sinc, on each side; with the window below, aliases are more than 70 dB down above 9.1 kHz
const STEPS = 512; // of the table, between two zero crossings
const CUTOFF = 0.92; // of the lower of the two bands

/** Windowed sinc interpolation (Blackman), the same for any split of the samples. */
export class Resampler {
  /** @param {number} rateHz of the samples to come */
  constructor(rateHz) {
    this.step = rateHz / RATE_HZ; // input samples per output sample
    this.scale = CUTOFF * Math.min(1, 1 / this.step); // zero crossings per input sample
    this.reach = Math.ceil(ZERO_CROSSINGS / this.scale); // input samples on each side
    this.table = Float32Array.from({ length: ZERO_CROSSINGS * STEPS + 2 }, (_, i) => windowedSinc(i / STEPS) * this.scale);
    this.kept = new Float32Array(this.reach); // silence stands before the first sample
    this.place = this.reach; // of the next output sample, in `kept`
  }

  /** @param {Float32Array} samples the next ones @returns {Float32Array} those at 16 kHz that are complete */
  push(samples) {
    const input = new Float32Array(this.kept.length + samples.length);
    input.set(this.kept);
    input.set(samples, this.kept.length);
    const output = new Float32Array(Math.max(Math.ceil((input.length - this.reach - this.place) / this.step), 0));
    for (let i = 0; i < output.length; i++, this.place += this.step) output[i] = this.#at(input, this.place);
    const done = Math.max(Math.floor(this.place) - this.reach, 0);
    this.kept = input.slice(done);
    this.place -= done;
    return output;
  }

  #at(input, place) {
    const first = Math.max(Math.ceil(place - this.reach), 0);
    const last = Math.min(Math.floor(place + this.reach), input.length - 1);
    let sum = 0;
    for (let i = first; i <= last; i++) {
      const crossing = Math.abs(place - i) * this.scale * STEPS;
      const left = Math.floor(crossing);
      if (left > ZERO_CROSSINGS * STEPS) continue;
      const right = crossing - left;
      sum += input[i] * (this.table[left] * (1 - right) + this.table[left + 1] * right);
    }
    return sum;
  }
}

function windowedSinc(x) {
  if (x >= ZERO_CROSSINGS) return 0;
  const turn = (Math.PI * x) / ZERO_CROSSINGS;
  const blackman = 0.42 + 0.5 * Math.cos(turn) + 0.08 * Math.cos(2 * turn);
  return x === 0 ? blackman : (blackman * Math.sin(Math.PI * x)) / (Math.PI * x);
}

/** @param {Float32Array} samples in [-1, 1] @returns {Int16Array} */
export function toPcm(samples) {
  return Int16Array.from(samples, (sample) => Math.max(-32768, Math.min(32767, Math.round(sample * 32768))));
}
