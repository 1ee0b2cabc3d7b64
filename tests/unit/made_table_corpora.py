"""Small corpora in the true layouts of the paper's tables, oddities included. Each maker returns what stage 0 should list, {id: (split, reason)}."""

import io
import json

import numpy as np
import pyarrow
import soundfile
from made_corpora import write_audio, write_lines
from pyarrow import parquet


def make_aishell2(folder):
    for place, prefix in (
        ("AISHELL-2/iOS/data", "IC"),
        ("AISHELL-DEV-TEST-SET/iOS/dev", "ID"),
        ("AISHELL-DEV-TEST-SET/iOS/test", "IT"),
        ("AISHELL-DEV-TEST-SET/Android/test", "AT"),
    ):
        names = [f"{prefix}0001W{number:04d}" for number in range(3)]
        for number, name in enumerate(names):
            write_audio(folder / place / "wav" / name[1:6] / f"{name}.wav", seed=number)
        write_lines(folder / place / "trans.txt", [f"{name}\t听YESTERDAY ONCE MORE" for name in names])
        write_lines(folder / place / "wav.scp", [f"{name}\twav/{name[1:6]}/{name}.wav" for name in names])
    write_audio(folder / "AISHELL-2/iOS/data/wav/C0002/IC0002W0001.wav")
    return {"IC0002W0001": ("train", "audio without transcript")}


def make_aishell2021eval(folder):
    for name in ("AISHELL-2021A", "AISHELL-2021-Eval-C", "D"):
        letter = name[-1]
        for number in range(2):
            write_audio(folder / name / "wav" / f"{letter}1109" / f"{letter}1109CO{number:04d}.wav", seed=number)
        write_lines(folder / name / "trans.txt", [f"{letter}1109CO{number:04d} 打开车窗" for number in range(2)])
    write_lines(folder / "doc" / "readme.txt", ["about"])
    return {}


def make_wenetspeech(folder):
    """One long recording to train on, one per test set; opus as published."""
    audios = []
    for part, aid, subsets in (("train/youtube/B00000", "Y1", ["L", "M"]), ("test_net/youtube", "N1", ["TEST_NET"]), ("test_meeting", "T1", None)):
        path = f"audio/{part}/{aid}.opus"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        tone = np.sqrt(2) * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
        samples = np.concatenate([level * tone for level in (0.1, 0.2, 0.3)]).astype(np.float32)
        soundfile.write(folder / path, samples, 16_000, format="OGG", subtype="OPUS")
        segments = [
            {"sid": f"{aid}_S{number:05d}", "begin_time": number, "end_time": number + 1.0, "text": "你 好", "subsets": subsets or ["TEST_MEETING"]}
            for number in range(3)
        ]
        audios.append({"aid": aid, "path": path, "duration": 3.0, "segments": segments})
    audios[0]["segments"].append({"sid": "Y1_S00099", "begin_time": 2.5, "end_time": 9.0, "text": "太长", "subsets": ["M"]})
    audios[0]["segments"].append({"sid": "Y1_S00098", "begin_time": 0.0, "end_time": 1.0, "text": "小", "subsets": ["S"]})
    audios[1]["segments"][-1]["end_time"] = 3.05  # a little behind the end of the recording, as some are
    (folder / "WenetSpeech.json").write_text(json.dumps({"audios": audios}, ensure_ascii=False), encoding="utf-8")
    return {"Y1_S00099": ("train_m", "outside its recording")}


def make_speechio(folder):
    for number in ("00001", "00002"):
        root = folder / f"SPEECHIO_ASR_ZH{number}"
        names = [f"IUVyA-lEs2w_{n:05d}" for n in range(3)]
        for n, name in enumerate(names):
            write_audio(root / "audio" / f"{name}.wav", seed=n)
        rows = [f'{name}\taudio/{name}.wav\t0.5\t他说"你好' for name in names]
        write_lines(
            root / "metadata.tsv", ["ID\tAUDIO\tDURATION\tTEXT", *rows, "gone_00001\taudio/gone.wav\t1.0\t没有"][: 5 if number == "00001" else 4]
        )
    return {"00001-gone_00001": ("test_zh00001", "missing audio file")}


def make_wenetspeech_chuan(folder):
    for name, count in (("Easy", 3), ("Hard", 2), ("Short", 1)):
        root = folder / "WSC-Eval-ASR" / name
        ids = [f"{name.lower()}_{number}" for number in range(count)]
        for number, utterance_id in enumerate(ids):
            write_audio(root / "wav" / f"{utterance_id}.wav", seed=number)
        write_lines(root / "text", [f"{utterance_id} 莫得*问题（要得）" for utterance_id in ids])
        write_lines(root / "wav.scp", [f"{utterance_id} Eval/{name}/wav/{utterance_id}.wav" for utterance_id in ids])
        write_lines(root / "key.txt", ids)
    return {}


TEXTGRID = '''File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 0.5
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "情感"
        xmin = 0
        xmax = 0.5
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 0.5
            text = "neutral"
    item [2]:
        class = "IntervalTier"
        name = "文本"
        xmin = 0
        xmax = 0.5
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 0.2
            text = "佢哋話""係"""
        intervals [2]:
            xmin = 0.2
            xmax = 0.3
            text = ""
        intervals [3]:
            xmin = 0.3
            xmax = 0.5
            text = "OK 啦"
'''


def make_wenetspeech_yue(folder):
    names = [f"000000445{number}" for number in range(3)]
    for number, name in enumerate(names):
        write_audio(folder / "Short" / "wav_" / f"{name}.wav", seed=number)
    write_lines(folder / "Short" / "content.txt", [f"{name}.wav\tyouth\tneutral\tmale\t你食咗飯未 ok" for name in names])
    write_audio(folder / "Long" / "wav" / "xq01.wav")
    write_audio(folder / "Long" / "wav" / "._xq01.wav")  # archives packed on a Mac bring such files
    (folder / "Long" / "TextGrid").mkdir()
    (folder / "Long" / "TextGrid" / "xq01.TextGrid").write_text(TEXTGRID, encoding="utf-8")
    return {}


def make_kespeech(folder, one_order=False):
    """Its files are in the same order, as lhotse's recipe needs them, only with `one_order`."""
    for split, count in (("train_phase1", 4), ("dev_phase1", 2), ("test", 3)):
        root = folder / "KeSpeech" / "Tasks" / "ASR" / split
        ids = [f"100{number}_{split.replace('_', '')}{number}" for number in range(count)]
        for number, name in enumerate(ids):
            write_audio(folder / "KeSpeech" / "Audio" / "1000" / "phase1" / f"{name}.wav", seed=number)
        write_lines(root / "wav.scp", [f"{name} Audio/1000/phase1/{name}.wav" for name in ids])
        write_lines(root / "text", [f"{name} 今天<SPOKEN_NOISE>天气" for name in (ids if one_order else reversed(ids))])
        write_lines(root / "utt2spk", [f"{name} 1000{number}" for number, name in enumerate(ids)])
        write_lines(root / "utt2subdialect", [f"{name} Beijing" for name in ids])
    with open(folder / "KeSpeech/Tasks/ASR/train_phase1/text", "a", encoding="utf-8") as file:
        file.write("1009_nobody 没有 声音\n")
    return {"1009_nobody": ("train_phase1", "transcript without audio")}


def make_voxpopuli(folder):
    """As get_asr_data.py of the corpus cuts it out: ogg files in folders of years."""
    root = folder / "transcribed_data" / "en"
    header = "id\traw_text\tnormalized_text\tspeaker_id\tsplit\tgender"
    for split in ("dev", "test"):
        ids = [f"20180206-0900-PLENARY-15-en_20180206-20:56:4{number}_{split}" for number in range(3)]
        for number, name in enumerate(ids):
            write_audio(root / "2018" / f"{name}.wav", seed=number)
            samples, rate = soundfile.read(root / "2018" / f"{name}.wav")
            soundfile.write(root / "2018" / f"{name}.ogg", samples, rate)
            (root / "2018" / f"{name}.wav").unlink()
        rows = [f'{name}\tMr "President,\tmr president\t{"None" if number else "28165"}\t{split}\tmale' for number, name in enumerate(ids)]
        write_lines(root / f"asr_{split}.tsv", [header, *rows])
    return {}


def make_mls_english(folder):
    root = folder / "mls_english_opus"
    write_lines(root / "metainfo.txt", ["10226 | F"])
    for split in ("dev", "test", "train"):
        names = [f"10226_10111_{split}{number}" for number in range(2)]
        for name in names:
            path = root / split / "audio" / "10226" / "10111" / f"{name}.opus"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, 0.1 * np.ones(16_000, np.float32), 16_000, format="OGG", subtype="OPUS")
        write_lines(root / split / "transcripts.txt", [f"{name}\tby far the greatest" for name in names])
        write_lines(root / split / "segments.txt", [f"{name}\thttp://example.org/a.mp3\t0\t1" for name in names])
    return {}


def make_cs_dialogue(folder):
    for split in ("train", "dev", "test"):
        names = [f"ZH-CN_U0018_S0_{split}{number}" for number in range(2)]
        for number, name in enumerate(names):
            write_audio(folder / "data" / "short_wav" / "short_wav" / "U0018" / f"{name}.wav", seed=number)
        write_lines(folder / "data" / "index" / "short_wav" / split / "wav.scp", [f"{name} short_wav/U0018/{name}.wav" for name in names])
        write_lines(folder / "data" / "index" / "short_wav" / split / "text", [f"{name} 我觉得 machine learning 很难" for name in names])
    return {}


def audio_bytes(seconds=0.5, seed=0, container="WAV"):
    content = io.BytesIO()
    samples = 0.05 * np.random.default_rng(seed).standard_normal(round(seconds * 16_000))
    soundfile.write(content, samples, 16_000, format=container, subtype="PCM_16")
    return content.getvalue()


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def make_ascend(folder):
    listed = {}
    number = 0
    for split, shards in (("train", 2), ("validation", 1), ("test", 1)):
        for shard in range(shards):
            rows = []
            for language in ("zh", "mixed", "en"):
                row = {"id": f"{number:05d}", "path": f"/cache/{number}.wav", "audio": {"bytes": audio_bytes(seed=number), "path": f"{number}.wav"}}
                row |= {"transcription": "我觉得 ok", "duration": 0.5, "language": language, "original_speaker_id": number % 3, "session_id": 1}
                rows.append(row | {"topic": "technology"})
                number += 1
            write_parquet(folder / "main" / f"{split}-{shard:05d}-of-{shards:05d}.parquet", rows)
    rows = parquet.read_table(folder / "main" / "test-00000-of-00001.parquet").to_pylist()
    rows.append(rows[0] | {"id": "00099", "audio": {"bytes": None, "path": "x.wav"}})
    write_parquet(folder / "main" / "test-00000-of-00001.parquet", rows)
    listed["ascend-00099"] = ("test", "transcript without audio")
    return listed


def make_m4singer(folder):
    names = [("Alto-1", "一千年以后", number) for number in range(2)] + [("Tenor-3", "后来", 0)]
    for singer, song, number in names:
        write_audio(folder / "m4singer" / f"{singer}#{song}" / f"{number:04d}.wav", rate_hz=48_000, seed=number)
    meta = [{"item_name": f"{singer}#{song}#{number:04d}", "txt": "<AP>因为在<SP>一千年", "phs": ["<AP>", "in"]} for singer, song, number in names]
    (folder / "m4singer" / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
    return {f"{singer}#{song}#{number:04d}": ("test", "resampled") for singer, song, number in names}


def make_aishell6_whisper(folder):
    lines, listed = [], {}
    for split, speaker in (("train", "S0001"), ("valid", "S0100"), ("test", "S0189")):
        for kind in ("whisper", "normal"):
            name = f"{kind}_{speaker}_M-0189-2_014060-014592"
            write_audio(folder / split / "audio" / "hfm" / kind / speaker / f"{name}.wav", rate_hz=48_000)
            lines.append(f"{name} 床前明月光")
            listed[name] = (f"{split}_{kind}", "resampled")
    lines.append("normal_S0189_M-0189-3_000000-000001 疑是地上霜")
    listed["normal_S0189_M-0189-3_000000-000001"] = ("test_normal", "transcript without audio")
    write_lines(folder / "text_sentence", lines)
    return listed


def make_vitw_bench(folder):
    rows = []
    for number, subset in enumerate(["real-zh-noise", "real-en-far_field", "sim-zh-mixed", "sim-en-dropout"] * 2):
        audio = {"bytes": audio_bytes(seed=number, container="FLAC"), "path": None}
        rows.append({"index": number, "audio": audio, "text": "你好", "subset": subset, "name": f"sample{number}"})
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows)
    return {}


def make_entities(folder):
    """What the maker of the test set has written and recorded; script.tsv comes from make_script.py."""
    write_lines(folder / "names.tsv", ["name\tweight\ttags", "西湖\t1\tpoi", "天空之城\t1\tpoi,media", "氛围灯\t1\tdevice"])
    return {}
