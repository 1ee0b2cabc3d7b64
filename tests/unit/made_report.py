"""What stages 2, 11 and 12 leave, made small: two sets, systems with and without hotwords, streams, texts that try to be HTML, audio that is gone."""

import json

import numpy as np
import soundfile
from lhotse import Recording
from made_corpora import run_program

from nim4.corpus.manifest import mono_cut, save_cuts

NUM_CLIPS = 45
HTML = "</script><script>window.broken = true</script><img src=x onerror='window.broken = true'>"
GONE = "u07"  # its audio is deleted
EVENTS = [(0.7, "", 0), (1.3, "北京", 0), (1.9, "北京商", 2), (2.1, "北京商行", 4)]  # when, what, how much stays


def id_of(i):
    return f"u{i:02d}"


def ref_of(i):
    return {2: HTML, 3: "post-office two"}.get(i, "总工北京商行")


def hyp_of(system, i):
    """Texts of which the page's filters find some: u05 is made up, hotwords mend each tenth, and streaming is worst at u04."""
    if i == 2:
        return HTML.replace("img", "svg")
    if i == 3:
        return "post office 2"
    if i == 5:
        return "opens all the doors of the house and the lights too"
    if system == "offline_hotwords" and i % 10 == 0:
        return "总工北京商行"
    if system == "streaming" and i == 4:
        return "是"
    return "总工北金商行" if i % 10 == 0 else "总工，北京商行。"


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_set(decode, system, test_set, refs, texts, hotwords="none"):
    folder = decode / system / test_set
    write_rows(folder / "refs.jsonl", [{"id": id, "phones": "", "text": text, "speaker": "s1", "audio_s": 2.0} for id, text in refs.items()])
    facts = {"phones": None, "audio_s": 2.0, "wall_s": 0.1, "error": None} | ({} if hotwords == "none" else {"hints": ["北京", "上海"]})
    write_rows(folder / "hyps.jsonl", [{"id": id, "text": text, **facts} for id, text in texts.items()])
    if system == "streaming":
        events = [(id, *event) for id in texts for event in EVENTS]
        keys = "id", "t_audio_s", "t_wall_s", "text", "settled_chars", "is_final"
        rows = [(id, when, when, text, stays, (when, text, stays) == EVENTS[-1]) for id, when, text, stays in events]
        write_rows(folder / "events.jsonl", [dict(zip(keys, row, strict=True)) for row in rows])
    decode_config = {"method": "llm", "streaming": system == "streaming", "hotwords": hotwords, "max_hints": 10}
    made_from = {"config": {"decode": decode_config, "hotwords": []}, "inputs": {}}
    command = "local/11_decode.py --model exp/made/base/8_grpo --units data/made/units"
    done = {"made_from": made_from, "commit": "abc1234", "seconds": 1.0, "model": "exp/made/base/8_grpo", "hardware": "A CPU", "command": command}
    (folder / "done.json").write_text(json.dumps(done), encoding="utf-8")


def make_inputs(folder, patch):
    """11_decode, 12_score and units below `folder`."""
    refs = {id_of(i): ref_of(i) for i in range(NUM_CLIPS)}
    for system, hotwords in (("offline", "none"), ("offline_hotwords", "lattice"), ("streaming", "none")):
        texts = {id_of(i): hyp_of(system, i) for i in range(NUM_CLIPS) if (system, i) != ("streaming", 6)}
        write_set(folder / "11_decode", system, "test", refs, texts, hotwords)
        write_set(
            folder / "11_decode", system, "test_noise", {"n1": "", "n2": ""}, {"n1": "open" if system == "streaming" else "", "n2": ""}, hotwords
        )
    seconds = np.arange(32_000) / 16_000
    for test_set, ids in (("test", refs), ("test_noise", {"n1": "", "n2": ""})):
        cuts = []
        for id, text in ids.items():
            path = folder / "audio" / f"{id}.wav"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, 0.5 * np.sin(2 * np.pi * 440 * seconds), 16_000, subtype="PCM_16")
            cuts.append(mono_cut(id, Recording.from_file(path), text, "s1", "en" if id == "u03" else "zh"))
        save_cuts(cuts, folder / "units" / f"{test_set}.jsonl.gz")
    (folder / "audio" / f"{GONE}.wav").unlink()
    run_program(patch, "12_score", "--decode", folder / "11_decode", "--out", folder / "12_score")
    return folder


def options(folder, out="13_report"):
    return ["--decode", folder / "11_decode", "--score", folder / "12_score", "--units", folder / "units", "--out", folder / out, "--jobs", 1]
