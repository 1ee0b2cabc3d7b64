"""`python -m nim4 encoder`, and stages that start from what it makes."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_firered import publish
from test_icefall import TINY, save, tensors
from tiny import align_options, pretrain_options, sft_options

from nim4.config import ZipformerConfig
from nim4.corpus.units import PhonemeInventory
from nim4.model.asr import load_speech_llm
from nim4.model.checkpoint import load_model, read_weights
from nim4.train.snapshots import kept_snapshots


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder of FireRedASR's layout."""
    return publish(tmp_path_factory.mktemp("published") / "aed", load_file(__file__.replace("test_encoder_folder.py", "firered.safetensors")))


@pytest.fixture(scope="module")
def made(published, units, tmp_path_factory):
    from nim4.published.encoder_folder import make_encoder_folder

    folder = tmp_path_factory.mktemp("made") / "encoder"
    make_encoder_folder(f"firered:{published}", units, folder)
    return folder


def test_the_folder_is_a_model_with_one_snapshot(made, units):
    model, inventory = load_model(made, torch.device("cpu"))
    assert inventory.tokens == PhonemeInventory.load(units / "tokens.txt").tokens
    assert (model.config.encoder.positions, model.config.head_layers) == ("relative", 3)
    (snapshot,) = kept_snapshots(made)
    assert snapshot.final
    assert read_weights(made / snapshot.path).keys() == model.state_dict().keys()


def test_the_same_again_is_skipped_and_a_changed_checkpoint_is_taken_anew(nim4, units, tmp_path, caplog):
    path = save(tmp_path / "epoch-2.pt", tensors())
    options = ["encoder", f"icefall:{path}", "--units", units, "--out", tmp_path / "encoder"]
    assert nim4(*options)[0] == 0
    before = (tmp_path / "encoder" / "model.safetensors").stat().st_mtime_ns
    assert nim4(*options)[0] == 0
    assert (tmp_path / "encoder" / "model.safetensors").stat().st_mtime_ns == before
    save(path, tensors(seed=1))
    assert nim4(*options)[0] == 0
    assert (tmp_path / "encoder" / "model.safetensors").stat().st_mtime_ns > before
    model, _ = load_model(tmp_path / "encoder", torch.device("cpu"))
    assert model.config.encoder == ZipformerConfig(**TINY)


@pytest.mark.parametrize("tokens", ["same", "others", None])
def test_the_ctc_output_is_taken_where_it_writes_the_same_symbols(units, tmp_path, caplog, tokens):
    from nim4.published.encoder_folder import make_encoder_folder

    inventory = PhonemeInventory.load(units / "tokens.txt")
    weights = tensors(vocab_size=len(inventory))
    path = save(tmp_path / "pretrained.pt", weights)
    if tokens is not None:
        symbols = inventory.tokens if tokens == "same" else inventory.tokens[:2] + inventory.tokens[:1:-1]
        (tmp_path / "tokens.txt").write_text("".join(f"{symbol} {number}\n" for number, symbol in enumerate(symbols)))
    with caplog.at_level("INFO", logger="nim4"):
        make_encoder_folder(f"icefall:{path}", units, tmp_path / "encoder")
    model, _ = load_model(tmp_path / "encoder", torch.device("cpu"))
    taken = tokens == "same"
    assert model.config.head_layers == (1 if taken else 3)
    assert torch.equal(model.head.layers[-1].weight, weights["ctc_output.1.weight"]) == taken
    told = {"same": "its CTC output, since", "others": "writes other symbols", None: "no tokens.txt beside it"}
    assert told[tokens] in caplog.text
    features = torch.randn(1, 60, 80)
    frames, _ = model.encoder(model.normalise(features), torch.tensor([60]))
    if taken:
        expected = (frames @ weights["ctc_output.1.weight"].T + weights["ctc_output.1.bias"]).log_softmax(-1)
        torch.testing.assert_close(model(features, torch.tensor([60]))[0], expected, atol=1e-4, rtol=1e-4)


def test_alignment_and_ia_sft_start_from_it(command, made, units, tmp_path):
    align, ia_sft = command("04_align"), command("05_ia_sft")
    assert align(*align_options(units, tmp_path, made, max_steps=2), "--out", tmp_path / "4_align") == (0, [])
    assert "which was trained elsewhere" in align.log
    options = [*sft_options(units, tmp_path, "ia_sft", tmp_path / "4_align", max_steps=2), "--out", tmp_path / "5_ia_sft"]
    assert ia_sft(*options, "--snapshots", made) == (0, [])
    assert "the last one is that of --init, which stays" in ia_sft.log
    model, _ = load_speech_llm(tmp_path / "5_ia_sft", torch.device("cpu"))
    kept = read_weights(made / "model.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.acoustic.state_dict().items())


def test_pre_training_starts_from_it_with_the_setting_that_the_error_names(command, made, units, tmp_path):
    pretrain = command("03_pretrain")
    options = [*pretrain_options(units, tmp_path, max_steps=1, learning_rate=0.0), "--init", made, "--out", tmp_path / "3_pretrain"]
    code, (error,) = pretrain(*options)
    assert code == 2
    assert "found ffn_dim 64, not 32; conv_kernel 5, not 7; subsampling_channels 32, not 4; 2 more. Fix: " in error
    setting = error.partition("--set '")[2].rstrip("'")
    assert pretrain(*options, "--set", setting) == (0, [])
    before, after = (read_weights(folder / "model.safetensors") for folder in (made, tmp_path / "3_pretrain"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wenet:x.pt", "expected icefall:FILE, icefall:FILE,avg=N or firered:FOLDER"),
        ("firered:x,avg=2", "expected icefall:FILE, icefall:FILE,avg=N or firered:FOLDER"),
        ("icefall:none/epoch-3.pt", "found nothing at none/epoch-3.pt"),
    ],
)
def test_a_wrong_name_is_told_and_the_folder_left_as_it_was(nim4, made, units, tmp_path, spec, message):
    shutil.copytree(made, tmp_path / "encoder")
    code, _, (error,) = nim4("encoder", spec, "--units", units, "--out", tmp_path / "encoder")
    assert code == 2
    assert message in error
    assert read_weights(tmp_path / "encoder" / "model.safetensors").keys() == read_weights(made / "model.safetensors").keys()
