"""The adapters in baselines/: what they make of raw outputs, what they ask a server, and the true classes with tiny, random weights."""

import importlib.util
import io
import json
import sys
import types
import wave

import pytest
import tiny_peers
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_corpora import write_audio
from spoken_server import SpokenServer
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.models.qwen3_asr.processing_qwen3_asr import _detect_and_fix_repetitions, _parse_single_output
from transformers.video_processing_utils import BaseVideoProcessor, VideoProcessorMixin

from nim4.baseline.adapters import FOLDER, names, read_baseline
from nim4.stage import write_jsonl

TINY = ["dtype=float32", "device=cpu", "decoding.max_new_tokens=5", "revision=null"]
CLEANED = [
    ("qwen3_asr", "language Chinese<asr_text>今天天气很好。", "今天天气很好。"),
    ("qwen3_asr", "language None<asr_text>", ""),
    ("qwen3_asr", "assistant\nlanguage English<asr_text>Hello.", "Hello."),
    ("qwen3_asr", "Hello.", "Hello."),
    ("qwen3_asr", "language Chinese<asr_text>好" + "那" * 60, "好那"),
    ("qwen3_asr", "language Chinese<asr_text>" + "谢谢大家" * 30 + "。", "谢谢大家。"),
    ("fun_asr_nano", "开放时间/sil早上9点 ", "开放时间 早上9点"),
    ("glm_asr_nano", ' The transcription of the audio is "so be it". ', "so be it"),
    ("glm_asr_nano", 'He said "no".', 'He said "no".'),
    ("qwen3_omni", "“今天天气很好。”", "今天天气很好。"),
    ("qwen3_omni", 'He said "no"', 'He said "no"'),
    ("fireredasr2s", " 今天天气很好 ", "今天天气很好"),
    ("step_audio2", "今天天气很好<|EOT|>", "今天天气很好"),
    ("openai", " a\n b ", "a b"),
]


@pytest.fixture(autouse=True)
def beside_the_worker(monkeypatch):
    """What adapters can import, as in their own process."""
    monkeypatch.syspath_prepend(FOLDER)


def adapter_of(baseline):
    spec = importlib.util.spec_from_file_location("adapter", baseline.adapter)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "raw", "text"), CLEANED)
def test_texts_of_raw_outputs(name, raw, text):
    baseline = read_baseline(name)
    assert adapter_of(baseline).clean(raw, baseline.settings) == text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.text("ab那\n", max_size=4), st.integers(1, 45)), max_size=5))
def test_repetitions_are_taken_out_as_the_authors_do(parts):
    raw = "".join(part * count for part, count in parts)
    baseline = read_baseline("qwen3_asr")
    adapter = adapter_of(baseline)
    assert adapter.without_repetitions(raw) == _detect_and_fix_repetitions(raw)
    assert adapter.clean(raw, baseline.settings) == _parse_single_output(raw)["transcription"]


def test_every_baseline_says_what_it_is_told(tmp_path):
    for name in names():
        told = read_baseline(name).settings
        assert told["title"]
        assert all(isinstance(value, str) for value in told["languages"].values())
        assert "http" in (read_baseline(name).folder / "settings.yaml").read_text(encoding="utf-8") or name == "openai"


# ------------------------------------------------------------------------------------------------------------------------ servers


@pytest.fixture
def clips(tmp_path):
    rows = []
    for name, language in (("a", "zh"), ("b", "en"), ("c", "zh-en")):
        write_audio(tmp_path / f"{name}.wav", seconds=0.4)
        rows.append({"id": name, "audio": f"{name}.wav", "language": language})
    write_jsonl(tmp_path / "clips.jsonl", rows)
    return tmp_path / "clips.jsonl"


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def spoken_s(data):
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
        return file.getnframes() / 16000


def test_a_server_is_asked_with_the_authors_prompt(nim4, clips, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with SpokenServer("language Chinese<asr_text>你好", 503, "hello", "嗨 hi") as server:
        code, _, errors = nim4("baseline", "run", "qwen3_asr", "--server", server.url, "--manifest", clips, "--out", tmp_path / "q.jsonl")
    assert (code, errors) == (0, [])
    rows = rows_of(tmp_path / "q.jsonl")
    assert [(row["text"], row["language"]) for row in rows] == [("你好", "Chinese"), ("hello", "English"), ("嗨 hi", None)]
    assert rows[0]["raw"] == "language Chinese<asr_text>你好"
    assert (rows[0]["finish"], rows[0]["tokens"]) == ("stop", 3)
    first, *_, last = server.asked
    assert first.headers["Authorization"] == "Bearer secret"
    assert first.body["model"] == "Qwen/Qwen3-ASR-1.7B-hf"
    assert first.body["temperature"] == 0
    system, user, begun = first.body["messages"]
    assert system == {"role": "system", "content": [{"type": "text", "text": ""}]}
    assert [part["type"] for part in user["content"]] == ["input_audio"]
    assert spoken_s(first.audio()) == pytest.approx(0.4)
    assert begun == {"role": "assistant", "content": "language Chinese<asr_text>"}
    assert first.body["continue_final_message"]
    assert [turn["role"] for turn in last.body["messages"]] == ["system", "user"]


def test_prompts_by_language(nim4, clips, tmp_path):
    wanted = {
        "fun_asr_nano": ["语音转写成中文：", "语音转写成英文：", "语音转写："],
        "qwen3_omni": ["请将这段中文语音转换为纯文本。", "Transcribe the English audio into text.", "Transcribe the audio into text."],
        "glm_asr_nano": ["Please transcribe this audio into text"] * 3,
    }
    for name, prompts in wanted.items():
        with SpokenServer("x", "x", "x") as server:
            assert nim4("baseline", "run", name, "--server", server.url, "--manifest", clips, "--out", tmp_path / f"{name}.jsonl")[0] == 0
        asked = [next(part["text"] for part in request.body["messages"][-1]["content"] if part["type"] == "text") for request in server.asked]
        assert asked == prompts


def test_a_server_for_transcripts(nim4, clips, tmp_path):
    options = ["--set", "server.endpoint=transcriptions", "--set", "server.name=nim4", "--set", "languages.zh=zh"]
    with SpokenServer("一", 400, "三") as server:
        code, _, errors = nim4("baseline", "run", "openai", "--server", server.url, "--manifest", clips, "--out", tmp_path / "o.jsonl", *options)
    assert code == 0
    assert len(errors) == 1
    rows = rows_of(tmp_path / "o.jsonl")
    assert [row["text"] for row in rows] == ["一", None, "三"]
    assert "answers 400" in rows[1]["error"]
    assert (server.asked[0].fields["model"], server.asked[0].fields["language"]) == (b"nim4", b"zh")
    assert spoken_s(server.asked[0].fields["file"]) == pytest.approx(0.4)
    assert "language" not in server.asked[2].fields


def test_no_server_is_told(nim4, clips, tmp_path):
    run = ("baseline", "run", "openai", "--manifest", clips, "--out", tmp_path / "o.jsonl")
    assert "add --server URL" in nim4(*run)[2][-1]
    code, _, errors = nim4(*run, "--server", "http://127.0.0.1:9/v1")
    assert code == 2
    assert "127.0.0.1:9/v1/models" in errors[-1]


# ------------------------------------------------------------------------------------------------------------------- true classes


def audio(folder):
    write_audio(folder / "clip.wav", seconds=1.3)
    return str(folder / "clip.wav")


def asked_of(model, path, language):
    inputs = model._inputs(model.processor, path, language)
    return model.processor.tokenizer.decode(inputs["input_ids"][0]).replace("<|audio_pad|>", "")


def test_qwen3_asr_by_the_command(nim4, clips, tmp_path):
    folder = tiny_peers.qwen3_asr(tmp_path / "model")
    options = [word for setting in (f"model={folder}", *TINY) for word in ("--set", setting)]
    out = tmp_path / "q.jsonl"
    code, _, errors = nim4("baseline", "run", "qwen3_asr", "--manifest", clips, "--out", out, "--python", sys.executable, *options)
    assert (code, errors) == (0, [])
    rows = rows_of(out)
    assert [(row["language"], row["tokens"], row["finish"], row["error"]) for row in rows] == [
        ("Chinese", 5, "length", None),
        ("English", 5, "length", None),
        (None, 5, "length", None),
    ]
    assert rows[0]["raw"] != rows[2]["raw"]


def test_qwen3_asr_is_told_the_language_in_its_answer(tmp_path):
    baseline = read_baseline("qwen3_asr", [f"model={tiny_peers.qwen3_asr(tmp_path / 'model')}", *TINY])
    model, path = adapter_of(baseline).load(baseline.settings), audio(tmp_path)
    begin = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|><|audio_end|><|im_end|>\n<|im_start|>assistant\n"
    assert asked_of(model, path, None) == begin
    assert asked_of(model, path, "Chinese") == begin + "language Chinese<asr_text>"
    assert model.transcribe(path, None) == model.transcribe(path, None)


def test_glm_asr_nano_is_asked_as_its_authors_do(tmp_path):
    baseline = read_baseline("glm_asr_nano", [f"model={tiny_peers.glm_asr_nano(tmp_path / 'model')}", *TINY])
    model, path = adapter_of(baseline).load(baseline.settings), audio(tmp_path)
    assert model.processor.default_transcription_prompt in asked_of(model, path, None)
    assert model.transcribe(path, None)["tokens"] == 5


def test_fun_asr_nano_is_told_the_language(tmp_path, kaldi_features):
    baseline = read_baseline("fun_asr_nano", [f"model={tiny_peers.fun_asr_nano(tmp_path / 'model')}", *TINY])
    model, path = adapter_of(baseline).load(baseline.settings), audio(tmp_path)
    assert "[中文]" in asked_of(model, path, "中文")
    assert "[" not in asked_of(model, path, None)
    assert model.transcribe(path, "中文")["tokens"] == 5


@pytest.fixture
def kaldi_features(monkeypatch):
    """transformers takes these features from torchaudio, which is in the lock file of that baseline and not in ours: here they are noise."""

    def fbank(waveform, num_mel_bins, **_):
        return torch.randn(1 + waveform.shape[1] // 160, num_mel_bins)

    fake = types.SimpleNamespace(compliance=types.SimpleNamespace(kaldi=types.SimpleNamespace(fbank=fbank)))
    monkeypatch.setattr(tiny_peers.FUN_ASR_FEATURES, "torchaudio", fake, raising=False)
    for module in (transformers, transformers.models.fun_asr_nano):
        monkeypatch.setattr(module, "FunAsrNanoFeatureExtractor", tiny_peers.FUN_ASR_FEATURES.FunAsrNanoFeatureExtractor)


def test_qwen3_omni_is_asked_in_the_language_and_writes_by_its_thinker(tmp_path, video_processor):
    baseline = read_baseline("qwen3_omni", [f"model={tiny_peers.qwen3_omni(tmp_path / 'model', video_processor)}", *TINY])
    model, path = adapter_of(baseline).load(baseline.settings), audio(tmp_path)
    begin = "<|im_start|>user\n<|audio_start|><|audio_end|>{}<|im_end|>\n<|im_start|>assistant\n"
    assert asked_of(model, path, "Chinese") == begin.format("请将这段中文语音转换为纯文本。")
    assert asked_of(model, path, None) == begin.format("Transcribe the audio into text.")
    made = model._inputs(model.processor, path, None)
    assert made["input_features"].shape == (1, 128, 130)
    assert (made["input_ids"] == model.model.config.thinker_config.audio_token_id).sum() == 17  # 13 of each 100 frames, 4 of the other 30
    answer = model.transcribe(path, "Chinese")
    assert (answer["tokens"], answer["finish"]) == (5, "length")
    assert model.transcribe(path, "Chinese") == answer
    assert model.transcribe(path, None)["raw"] != answer["raw"]


@pytest.fixture
def video_processor(monkeypatch):
    """transformers has the true one beside torchvision, which is in the lock file of that baseline and not in ours: of what sees nothing, its merge
    size alone is asked for."""

    class Unseeing(BaseVideoProcessor):
        merge_size = 2

        def __init__(self):
            pass

        def to_dict(self):
            return {"video_processor_type": "Qwen2VLVideoProcessor"}

    monkeypatch.setattr(transformers.processing_utils.transformers_module, "VideoProcessorMixin", VideoProcessorMixin, raising=False)
    monkeypatch.setattr(AutoVideoProcessor, "from_pretrained", lambda *_, **__: Unseeing())
    return Unseeing()


class FakeFireRed:
    def __init__(self, answers):
        self.transcribe = lambda ids, paths: answers


FAILED = [[], [{"uttid": "other", "text": "x", "rtf": "0.1"}], [{"uttid": "clip", "rtf": "0.1"}], [{"uttid": "clip", "text": ""}]]


@pytest.mark.parametrize("answers", FAILED)
def test_what_firered_leaves_out_is_an_error(answers):
    adapter = adapter_of(read_baseline("fireredasr2s"))
    assert adapter.FireRed(FakeFireRed([{"uttid": "clip", "text": "你好", "rtf": "0.07"}])).transcribe("a.wav", None) == {"raw": "你好"}
    with pytest.raises(RuntimeError, match="no result"):
        adapter.FireRed(FakeFireRed(answers)).transcribe("a.wav", None)


def test_step_audio2_is_asked_as_its_authors_do():
    baseline, asked = read_baseline("step_audio2"), []

    def model(messages, **settings):
        asked.append((messages, settings))
        return list(range(255)), "你好<|EOT|>", []

    answer = adapter_of(baseline).Step(model, baseline.settings).transcribe("a.wav", None)
    assert answer == {"raw": "你好<|EOT|>", "tokens": 255, "finish": "length"}
    messages, decoding = asked[0]
    assert [turn["role"] for turn in messages] == ["system", "human", "assistant"]
    assert messages[0]["content"] == "请记录下你所听到的语音内容。"
    assert messages[1]["content"] == [{"type": "audio", "audio": "a.wav"}]
    assert decoding["do_sample"] is False


def test_pocketsphinx_marks_are_no_words(monkeypatch):
    monkeypatch.setitem(sys.modules, "pocketsphinx", types.SimpleNamespace(Decoder=None))
    adapter = adapter_of(read_baseline("pocketsphinx"))
    assert adapter.clean("<s> a(2) house [NOISE] ++breath++ </s>", {}) == "a house"
