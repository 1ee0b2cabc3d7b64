// A stream as it was shown: its texts come when they came, with the audio where there is some, else by the clock.
"use strict";

/**
 * @param {{seconds: number}} clip
 * @param {[number, string, number | null][]} shown when in s, what, and how many of its characters stay; null: all of them
 * @param {HTMLAudioElement | null} audio
 */
function replayOf(clip, shown, audio) {
  const end = Math.max(clip.seconds, shown.at(-1)[0]);
  const button = make("button", "", "Play stream");
  button.type = "button";
  const slider = make("input");
  Object.assign(slider, { type: "range", min: 0, max: end.toFixed(2), step: 0.01, value: 0 });
  slider.setAttribute("aria-label", "Time in the stream, in seconds");
  const clock = make("output", "quiet");
  const text = make("p", "stream");
  let running = 0; // of the animation
  let origin = 0; // ms, when the stream began

  const show = (time) => {
    slider.value = time;
    clock.textContent = `${time.toFixed(2)} of ${end.toFixed(2)} s`;
    const [, words, stays] = shown.findLast(([when]) => when <= time + 1e-6) ?? [0, "", null];
    const settled = stays ?? words.length;
    text.replaceChildren(words.slice(0, settled), make("span", "changing", words.slice(settled)));
  };
  const stop = () => {
    cancelAnimationFrame(running);
    running = 0;
    button.textContent = "Play stream";
  };
  const step = () => {
    if (audio && !audio.paused && !audio.ended) origin = performance.now() - 1000 * (audio.currentTime - startOf(audio));
    const time = Math.min((performance.now() - origin) / 1000, end);
    show(time);
    if (time >= end) return stop();
    running = requestAnimationFrame(step);
  };
  const play = async () => {
    const from = Number(slider.value) >= end ? 0 : Number(slider.value);
    button.textContent = "Stop";
    origin = performance.now() - 1000 * from;
    if (audio && from < clip.seconds) {
      audio.currentTime = startOf(audio) + from;
      await audio.play().catch(() => {}); // what cannot be played is told beside the player; the texts come all the same
      origin = performance.now() - 1000 * from;
    }
    running = requestAnimationFrame(step);
  };
  button.onclick = () => {
    if (running === 0) return void play();
    audio?.pause();
    stop();
  };
  slider.oninput = () => {
    audio?.pause();
    stop();
    show(Number(slider.value));
  };
  show(0);
  return make("div", "replay", make("div", "line", button, slider, clock), text);
}

/** Where a clip begins in its file: the address of a part of a recording says it. */
function startOf(audio) {
  return Number(/#t=([\d.]+)/.exec(audio.src)?.[1] ?? 0);
}
