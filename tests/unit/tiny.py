"""A tiny model, tiny manifests with features, and tiny inputs for stages 3 and 11."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from lhotse import CutSet, Features, LilcomChunkyWriter, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from made_corpora import write_audio
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from nim4.config import AdaptorConfig, ConformerConfig, LlmConfig, ModelConfig, ZipformerConfig, build
from nim4.corpus.batch import Batch
from nim4.corpus.manifest import cuts_from_table, save_cuts
from nim4.corpus.prompts import TURN_END, TURN_START
from nim4.corpus.table import Row
from nim4.corpus.units import PhonemeInventory
from nim4.model.asr import SpeechLlm
from nim4.model.ctc import PhonemeModel
from nim4.model.llm import load_llm
from nim4.stage import StageOutput

INVENTORY = PhonemeInventory(["<blk>", "<unk>", "a", "b", "c", "d"])
ENCODER = {"dim": 16, "num_blocks": 2, "num_heads": 2, "ffn_dim": 32, "conv_kernel": 7, "subsampling_channels": 4, "dropout": 0.0}
ZIPFORMER = {
    "kind": "zipformer",
    "dims": [16, 24],
    "downsampling": [1, 2],
    "num_layers": [1, 1],
    "num_heads": [2, 2],
    "ffn_dims": [16, 24],
    "conv_kernels": [7, 5],
    "unmasked_dims": [12, 16],
    "query_head_dim": 8,
    "value_head_dim": 4,
    "pos_dim": 8,
    "subsampling_channels": [2, 2, 4],
    "dropout": 0.1,
    "relax_steps": 4,
}
TRAIN = {
    "max_steps": 6,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "max_duration_s": 5,
    "num_buckets": 2,
    "num_workers": 0,
    "log_every": 2,
    "valid_every": 3,
    "save_every": 2,
    "keep_last": 2,
    "average_last": 2,
    "cr_warmup_steps": 2,
    "augment": {"time_warp_frames": 10},
}
TEXTS = ("你好", "北京", "上海")


def tiny_model(vocab_size=6, seed=0, **encoder):
    """A random model in evaluation mode, for `INVENTORY` unless another size is given."""
    torch.manual_seed(seed)
    model = PhonemeModel(ModelConfig(ConformerConfig(**(ENCODER | encoder)), vocab_size)).eval()
    model.set_normalisation(torch.full((80,), -8.0), torch.full((80,), 4.0))
    return model


def tiny_zipformer(vocab_size=6, seed=0, **encoder):
    """The same with a Zipformer, whose layers do more than they do at first."""
    torch.manual_seed(seed)
    model = PhonemeModel(ModelConfig(build(ZipformerConfig, ZIPFORMER | encoder, "tiny"), vocab_size)).eval()
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            if name.endswith("out_proj.weight"):
                parameter.mul_(10)
    model.set_normalisation(torch.full((80,), -8.0), torch.full((80,), 4.0))
    return model


def tiny_tokenizer():
    """One token per byte, and the two turn markers."""

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN_START, TURN_END]})
    return tokenizer


def tiny_llm(folder, seed=0, scale=20, **shape):
    """A random Qwen3-shaped language model with ChatML turns, in Hugging Face layout; returns the folder."""

    torch.manual_seed(seed)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    sizes = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": True}
    model = Qwen3ForCausalLM(Qwen3Config(**(sizes | heads | shape)))
    with torch.no_grad():  # far from uniform, so that tests see different tokens
        model.model.embed_tokens.weight.mul_(scale)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_speech_llm(llm_folder, seed=0, **encoder):
    """A random speech LLM for `INVENTORY` in evaluation mode: `tiny_model`, an adaptor, and the language model of a folder."""
    acoustic = tiny_model(seed=seed, **encoder)
    config = replace(acoustic.config, adaptor=AdaptorConfig(hidden_dim=24), llm=LlmConfig(name=str(llm_folder)))
    torch.manual_seed(seed)
    return SpeechLlm(acoustic, load_llm(config.llm), config).eval()


def make_talkative(model):
    """Changes a random speech LLM so that it hears changing phonemes, and its texts depend on all that it reads, not on the last token alone."""
    x = torch.randn(1, 400, 80, generator=torch.Generator().manual_seed(0)) * 4 - 8
    with torch.no_grad():
        for layer in model.llm.model.layers:
            layer.self_attn.v_proj.weight.mul_(10)
            layer.self_attn.o_proj.weight.mul_(10)
            layer.self_attn.q_norm.weight.mul_(3)
        model.adaptor.down.weight.mul_(10)
        frames, _ = model.encode(x, torch.tensor([400]))
        model.acoustic.head.layers[-1].bias.sub_(model.acoustic.head.layers(frames)[0].mean(0))
    return model


def noise_batch(lens, seed=0, phones=((2, 3),)):
    """Features of these lengths, normal, zero beyond; `phones` repeats over the utterances."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lens), max(lens), 80, generator=generator)
    for row, length in zip(x, lens, strict=True):
        row[length:] = 0
    targets = [torch.tensor(phones[i % len(phones)]) for i in range(len(lens))]
    return Batch(
        ids=[f"u{i}" for i in range(len(lens))],
        x=x,
        x_lens=torch.tensor(lens),
        phones=torch.nn.utils.rnn.pad_sequence(targets, batch_first=True),
        phone_lens=torch.tensor([len(target) for target in targets]),
    )


def write_features(folder, split, lens, prefix="u"):
    """A manifest like stage 2's, `folder/split.jsonl.gz`, with noise of these lengths (frames) as features and a few phonemes each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(lens))
    cuts = []
    with LilcomChunkyWriter(folder / f"{split}.lca") as writer:
        for number, length in enumerate(lens):
            name, duration_s = f"{prefix}{number:03d}", length / 100
            features = Features(
                type="fbank",
                num_frames=length,
                num_features=80,
                frame_shift=0.01,
                sampling_rate=16_000,
                start=0.0,
                duration=duration_s,
                recording_id=name,
                channels=0,
                storage_type=writer.name,
                storage_path=str(writer.storage_path),
                storage_key=writer.write(name, rng.standard_normal((length, 80)).astype(np.float32)),
            )
            recording = Recording(name, [AudioSource("file", [0], f"{name}.wav")], 16_000, length * 160, duration_s)
            phones = " ".join(rng.choice(["a", "b", "c", "d"], size=3))
            supervision = SupervisionSegment(name, name, 0.0, duration_s, text=phones, speaker="s", language="zh", custom={"phones": phones})
            cuts.append(MonoCut(name, 0.0, duration_s, 0, [supervision], features=features, recording=recording))
    save_cuts(CutSet.from_cuts(cuts), folder / f"{split}.jsonl.gz")
    return folder / f"{split}.jsonl.gz"


def write_manifests(folder):
    """`folder/manifests` as stage 0 leaves it: made audio of 0.6 to 1.5 s, 12 utterances in train, 4 in dev, 4 in test."""
    output = StageOutput(folder / "manifests", config={})
    work = output.begin()
    for split, count in (("train", 12), ("dev", 4), ("test", 4)):
        rows = []
        for number in range(count):
            audio = folder / "audio" / f"{split}{number}.wav"
            write_audio(audio, seconds=0.6 + 0.08 * number, seed=number)
            rows.append(Row(f"{split}{number}", audio, TEXTS[number % 3], f"s{number % 2}", "zh"))
        save_cuts(cuts_from_table(rows)[0], work / f"{split}.jsonl.gz")
    output.finish()


def write_yaml(path, values):
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


SFT = {name: TRAIN[name] for name in TRAIN if name not in ("cr_warmup_steps", "augment")}


def sft_options(units, folder: Path, section, init, more=None, **train):
    """Options of a stage after 3 for the tiny model, without --out; its config is written to `folder`."""
    config = write_yaml(folder / f"tiny_{section}.yaml", {section: {"train": SFT | train, **(more or {})}})
    inputs = ["--units", units, "--train", "train", "--valid", "dev", "--train-config", config, "--init", init]
    return [*map(str, inputs), "--device", "cpu"]


def align_options(units, folder: Path, init, **train):
    """Options of stage 4 with a tiny language model, which is written to `folder`."""
    shape = {"adaptor": {"hidden_dim": 24}, "llm": {"name": str(tiny_llm(folder / "llm"))}}
    return [*sft_options(units, folder, "align", init, **train), "--model-config", str(write_yaml(folder / "tiny_llm.yaml", shape))]


def pretrain_options(units, folder: Path, encoder=ENCODER, **train):
    """Options of stage 3 for the tiny model, without --out; its configs are written to `folder`."""
    model = write_yaml(folder / "tiny_model.yaml", {"encoder": encoder})
    cka = {"threshold": 0.9999, "every_fraction": 0.2, "max_frames": 100}
    config = write_yaml(folder / "tiny_train.yaml", {"pretrain": {"train": TRAIN | train, "cka": cka}})
    cmvn = units.parent / "fbank" / "cmvn.json"
    inputs = ["--units", units, "--cmvn", cmvn, "--train", "train", "--valid", "dev"]
    return [*map(str, inputs), "--model-config", str(model), "--train-config", str(config), "--device", "cpu"]
