"""NSE, PAI and CSAI on a fixed list of utterances, and the command that reports them."""

import json
import math
import shutil
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model

from nim4 import __main__ as command_line
from nim4.config import EntropyConfig, RecipeError
from nim4.corpus.g2p import Lexicon
from nim4.corpus.manifest import load_cuts
from nim4.corpus.units import PhonemeInventory
from nim4.model.checkpoint import load_snapshot, read_weights, save_weights
from nim4.train.entropy import FixedList, text_units

CONFIG = EntropyConfig(steps=150, batch_rows=64, learning_rate=3e-2, num_seeds=2)
SETTINGS = ("--set", "steps=20", "--set", "num_seeds=2")


@pytest.fixture(scope="module")
def homophones(units):
    """48 utterances of the texts 他好 and 她好, which sound alike."""
    cuts = []
    for number, cut in enumerate([cut for cut in load_cuts(units / "train.jsonl.gz")] * 4):
        copy = deepcopy(cut).with_id(f"u{number:02d}")
        copy.supervisions[0].text = "他好" if number * 7 % 12 < 6 else "她好"
        copy.supervisions[0].custom = {"phones": "t a1 h ao3"}
        cuts.append(copy)
    return cuts


def fixed_list(cuts, config=CONFIG, **changes):
    inventory = PhonemeInventory.default()
    return FixedList(cuts, tiny_model(len(inventory), **changes), inventory, Lexicon("zh"), config)


def measured(fixed, monkeypatch, frames, means):
    """What is measured where an encoder gives these frames and means."""
    monkeypatch.setattr(fixed, "views", lambda model: (frames, means))
    return fixed.measure(None)


def noise(rows, columns=8):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("columns", "expected"), [(8, 1.0), (1, 0.0)])
def test_nse_is_1_for_all_directions_alike_and_0_for_one(homophones, monkeypatch, columns, expected):
    fixed = fixed_list(homophones)
    frames = 5 + noise(fixed.num_frames, columns).repeat(1, 8 // columns)  # their mean is no direction
    assert measured(fixed, monkeypatch, frames, noise(fixed.num_units))["nse"] == pytest.approx(expected, abs=0.01)


def test_pai_is_the_entropy_of_the_phones_when_frames_name_them(homophones, monkeypatch):
    fixed = fixed_list(homophones)
    phones = torch.cat([spoken.phones for spoken in fixed.spoken])
    record = measured(fixed, monkeypatch, F.one_hot(phones).float(), noise(fixed.num_units))
    assert record["pai"] == pytest.approx(fixed.facts()["phone_entropy"], rel=0.02)
    assert record["pai_share"] == pytest.approx(1, abs=0.02)
    assert 0.3 < fixed.facts()["phone_entropy"] < 1.5, "four phones"
    assert record["pai_std"] < 0.1


def test_pai_is_0_when_frames_are_noise(homophones, monkeypatch):
    fixed = fixed_list(homophones)
    record = measured(fixed, monkeypatch, noise(fixed.num_frames, 30), noise(fixed.num_units))
    assert abs(record["pai"]) < 0.05
    assert abs(record["pai_share"]) < 0.05


def test_csai_is_what_frames_tell_of_the_unit_beyond_its_phones(homophones, monkeypatch):
    fixed = fixed_list(homophones)
    labels = [label for spoken in fixed.spoken for label, *_ in spoken.units]
    sounds = [ids[0] for spoken in fixed.spoken for _, ids, _, _ in spoken.units]
    names, frames = torch.tensor(["他她好".index(label) for label in labels]), noise(fixed.num_frames)
    known = fixed.facts()["unit_entropy_given_phones"]
    assert known == pytest.approx(math.log(2) / 2, rel=0.15), "他 or 她 in one half of the units"
    assert measured(fixed, monkeypatch, frames, F.one_hot(names).float())["csai"] == pytest.approx(known, rel=0.05)
    assert abs(measured(fixed, monkeypatch, frames, F.one_hot(torch.tensor(sounds)).float())["csai"]) < 0.03, "phones only"
    assert abs(measured(fixed, monkeypatch, frames, noise(len(names), 30))["csai"]) < 0.03
    assert fixed.num_homophones == len(labels) / 2 == 48


def test_views_are_the_frames_of_the_alignment(homophones):
    fixed, model = fixed_list(homophones), tiny_model(243, seed=1)
    frames, means = fixed.views(model)
    assert (len(frames), len(means)) == (fixed.num_frames, fixed.num_units)
    last = fixed.spoken[-1]
    cut = next(cut for cut in homophones if cut.id == last.id)
    x = torch.from_numpy(cut.load_features())[None]
    with torch.no_grad():
        encoded, _ = model.encoder(model.normalise(x), torch.tensor([x.shape[1]]))
    torch.testing.assert_close(frames[-len(last.frames) :], encoded[0, last.frames], atol=1e-4, rtol=1e-4)
    _, ids, start, end = last.units[-1]
    assert last.phones.unique().tolist() == sorted(PhonemeInventory.default().encode("t a1 h ao3"))
    assert len(ids) == 2
    torch.testing.assert_close(means[-1], encoded[0, start : end + 1].mean(0), atol=1e-4, rtol=1e-4)


def test_text_units_are_characters_and_words():
    words = [("银行", ("0", "in2", "h", "ang2")), ("call", ("K", "AO", "L")), ("好", ("h", "ao3")), ("囧", ("<unk>",))]
    assert text_units(words) == [("银", 2), ("行", 2), ("call", 3), ("好", 2), ("囧", 1)]


def test_utterances_that_cannot_be_used_are_counted(homophones):
    cuts = [deepcopy(cut) for cut in homophones[:9]]
    cuts[0].supervisions[0].custom = {"phones": ""}
    cuts[1].supervisions[0].text = "别的"
    text = "好" * 30
    cuts[2].supervisions[0].text, cuts[2].supervisions[0].custom = text, {"phones": " ".join(["h ao3"] * 30)}
    assert fixed_list([*homophones[9:], *cuts]).left_out == {"no phones": 1, "phones do not fit": 1, "read otherwise": 1}
    with pytest.raises(RecipeError, match=r"at least 4 usable utterances, found 3 \(no phones: 1, phones do not fit: 1, read otherwise: 1\)"):
        fixed_list(cuts[:6])


@pytest.fixture
def entropy(units, trained, tmp_path, nim4):
    """`python -m nim4 entropy` as a function of its checkpoints and further options: exit code, error lines, what it printed."""

    def run(*arguments):
        fixed = ("--units", units, "--split", "train", "--reference", trained, "--out", tmp_path / "out", "--device", "cpu", *SETTINGS)
        code, printed, told = nim4("entropy", *arguments[:1], *fixed, *arguments[1:])
        return code, [line for line in told if " ERROR " in line], "\n".join(printed)

    return run


def test_the_command_reports_every_snapshot(trained, entropy, tmp_path, monkeypatch):
    snapshots = sorted((trained / "snapshots").glob("step-*.safetensors"), reverse=True)
    steps = sorted(int(path.stem[5:]) for path in snapshots if path.stem[5:].isdigit())
    assert len(steps) > 1
    monkeypatch.setattr(command_line, "in_order", lambda paths, original=command_line.in_order: original([*paths, *snapshots]))
    code, errors, printed = entropy(snapshots[0])
    assert (code, errors) == (0, [])
    records = [json.loads(line) for line in (tmp_path / "out" / "entropy.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["step"] for record in records] == steps
    for record in records:
        assert record["seeds"] == [0, 1]
        assert 0 < record["nse"] < 1
        assert record["pai_share"] <= 1
        assert record["definitions"].startswith("ours")
        assert {"pai", "pai_std", "csai", "csai_std", "frames", "commit", "reference", "split", "config"} <= record.keys()
        assert record["name"] in printed
    assert "our definitions" in printed
    assert (tmp_path / "out" / "entropy.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_folder_is_measured_by_its_encoder_alone(trained, entropy, tmp_path):
    later = tmp_path / "4_align"
    shutil.copytree(trained, later)
    save_weights(later / "model.safetensors", read_weights(trained / "model.safetensors") | {"adaptor.up.weight": torch.zeros(2, 2)})
    (later / "done.json").unlink()
    code, errors, _ = entropy(later)
    assert (code, errors) == (0, [])
    (record,) = map(json.loads, (tmp_path / "out" / "entropy.jsonl").read_text(encoding="utf-8").splitlines())
    assert (record["name"], record["step"]) == (str(later), None)


def broken_snapshot(folder, trained, **changes):
    (folder / "snapshots").mkdir(parents=True)
    shutil.copy(trained / "config.yaml", folder)
    weights = read_weights(trained / "model.safetensors")
    weights = {name: changes.get(name, tensor) for name, tensor in weights.items()}
    save_weights(folder / "snapshots" / "step-3.safetensors", {name: tensor for name, tensor in weights.items() if tensor is not None})
    return folder / "snapshots" / "step-3.safetensors"


def test_bad_input_is_one_line_and_exit_code_2(trained, units, entropy, tmp_path):
    nan = read_weights(trained / "model.safetensors")["encoder.subsampling.norm.weight"] * float("nan")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    frames_only = tmp_path / "step-2-reference.safetensors"
    frames_only.write_text("x")
    no_config = tmp_path / "apart" / "deep" / "step-1.safetensors"
    save_weights(no_config, {"mean": torch.zeros(80)})
    cases = [
        ((tmp_path / "missing",), "no such file or folder"),
        ((tmp_path / "empty",), "expected a model folder"),
        ((tmp_path / "file",), "config.yaml one folder up"),
        ((no_config,), "config.yaml one folder up"),
        ((frames_only,), "found only"),
        ((broken_snapshot(tmp_path / "a", trained, **{"encoder.subsampling.norm.weight": nan}),), "not finite"),
        ((broken_snapshot(tmp_path / "b", trained, **{"encoder.subsampling.norm.weight": None}),), "norm.weight is missing"),
        ((trained, "--split", "absent"), "expected a manifest"),
        ((trained, "--set", "step=3"), "did you mean 'steps'"),
        ((trained, "--set", "num_seeds=0"), "at least 1"),
        ((trained, "--set", "max_utterances=3"), "at least 4 usable utterances, found 3"),
        ((trained, "--out", tmp_path / "file"), "expected a folder"),
        ((trained, "--reference", tmp_path / "empty"), "expected a model folder"),
        ((trained, "--units", tmp_path / "empty"), "expected a manifest"),
    ]
    for arguments, message in cases:
        code, errors, printed = entropy(*arguments)
        assert code == 2, arguments
        assert len(errors) == 1, arguments
        assert message in errors[0]
        assert not printed
    assert not (tmp_path / "out").exists()


def test_a_snapshot_is_the_phoneme_model_that_was_saved(trained):
    path = next(path for path in (trained / "snapshots").glob("step-*.safetensors") if path.stem[5:].isdigit())
    model = load_snapshot(path, torch.device("cpu"))
    assert not model.training
    saved = read_weights(path)
    assert all(tensor.equal(saved[name]) for name, tensor in model.state_dict().items())
