"""The order of batches: repeatable from any point, nothing lost, and the same utterances for any number of processes."""

from collections import Counter
from itertools import islice

import pytest
import torch
from tiny import INVENTORY, write_features

from nim4.config import OptimConfig, RecipeError
from nim4.corpus.batch import Source, TrainBatches, collate, eval_batches, parse_sources, phone_batches
from nim4.corpus.manifest import load_cuts, save_cuts

LENS = [40 + 7 * (i * 13 % 30) for i in range(30)]  # 0.4 to 2.4 s, mixed


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("features"), "train", LENS)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("features"), "train", [50] * 10, prefix="o")


def make(*sources, **settings):
    place = {name: settings.pop(name) for name in ("rank", "world_size") if name in settings}
    defaults = {"max_duration_s": 6.0, "accum": 1, "seed": 0, "num_buckets": 3, "num_workers": 0, "short_first_epochs": 0}
    sources = [s if isinstance(s, Source) else Source(s) for s in sources]
    return TrainBatches(sources, phone_batches(INVENTORY), OptimConfig(**(defaults | settings)), **place)


def ids(steps):
    return [(epoch, step, [batch.ids for batch in micro_batches]) for epoch, step, micro_batches in steps]


def epochs(batches, count):
    """The utterances of the first epochs, batch by batch."""
    found = [[] for _ in range(count)]
    for epoch, _, micro_batches in batches.steps():
        if epoch == count:
            return found
        found[epoch] += [batch.ids for batch in micro_batches]


def flat(batches):
    return [name for batch in batches for name in batch]


@pytest.mark.parametrize(("lens", "settings"), [(LENS, {"num_buckets": 1}), (LENS[:3], {"max_duration_s": 2.0})])
def test_one_bucket_takes_the_utterances_as_they_are_drawn(tmp_path, lens, settings):
    path = write_features(tmp_path, "train", lens)
    first, second = epochs(make(path, **settings), 2)
    assert epochs(make(path, **settings), 2) == [first, second]
    assert sorted(flat(first)) == sorted(flat(second)) == sorted(cut.id for cut in load_cuts(path))
    assert first != second


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_order_can_be_taken_up_anywhere(manifest, num_workers):
    settings = {"short_first_epochs": 1, "num_workers": num_workers, "accum": 2}
    whole = ids(islice(make(manifest, **settings).steps(), 14))
    assert whole[-1][0] >= 2  # over the ends of epochs
    for taken in (1, 3, 7, 12):
        epoch, step, _ = whole[taken - 1]
        rest = ids(islice(make(manifest, **settings).steps(epoch, step + 1), 14 - taken))
        assert rest == whole[taken:]


def test_data_workers_do_not_change_the_order(manifest):
    assert ids(islice(make(manifest, num_workers=2).steps(), 10)) == ids(islice(make(manifest).steps(), 10))


def test_the_seed_and_the_epoch_decide_the_order(manifest):
    first, second = epochs(make(manifest), 2)
    assert first != second
    assert epochs(make(manifest, seed=1), 1)[0] != first


@pytest.mark.parametrize("short_first_epochs", [0, 2])
def test_every_utterance_comes_once_per_epoch(manifest, short_first_epochs):
    everything = {cut.id for cut in load_cuts(manifest)}
    for epoch in epochs(make(manifest, short_first_epochs=short_first_epochs), 3):
        assert sorted(flat(epoch)) == sorted(everything)


def test_only_the_last_incomplete_step_of_an_epoch_is_left_out(manifest):
    singles, triples = epochs(make(manifest), 1)[0], epochs(make(manifest, accum=3), 1)[0]
    assert len(singles) % 3 != 0
    assert triples == singles[: len(singles) // 3 * 3]


@pytest.mark.parametrize(("world_size", "accum"), [(2, 1), (4, 1), (2, 2)])
def test_processes_share_out_the_batches_of_one(manifest, world_size, accum):
    alone = ids(islice(make(manifest, accum=world_size * accum).steps(), 5))
    ranks = [ids(islice(make(manifest, accum=accum, rank=rank, world_size=world_size).steps(), 5)) for rank in range(world_size)]
    for number, (epoch, step, batches) in enumerate(alone):
        for rank, own in enumerate(ranks):
            assert own[number] == (epoch, step, batches[rank::world_size])


def test_the_plan_is_what_the_steps_of_all_processes_take(manifest):
    settings = {"short_first_epochs": 1, "accum": 2, "world_size": 2}
    for num_steps in (1, 9):  # the latter over the end of an epoch
        steps = [step for rank in (0, 1) for step in islice(make(manifest, rank=rank, **settings).steps(), num_steps)]
        taken = Counter((epoch, name) for epoch, _, batches in steps for batch in batches for name in batch.ids)
        assert Counter((epoch, cut.id) for epoch, cut in make(manifest, **settings).planned(num_steps)) == taken
    assert max(epoch for epoch, _ in taken) >= 1
    assert list(make(manifest, accum=100).planned(3)) == []  # not a single whole step in an epoch


def test_sorted_epochs_come_first_and_ascend(manifest):
    lens = dict(zip((f"u{i:03d}" for i in range(30)), LENS, strict=True))
    first, second = epochs(make(manifest, short_first_epochs=1), 2)
    durations = [lens[name] for name in flat(first)]
    assert durations == sorted(durations)
    assert [lens[name] for name in flat(second)] != durations


def test_batches_are_no_longer_than_allowed_and_hold_little_padding(manifest):
    shares = []
    for _, _, (batch,) in islice(make(manifest).steps(), 20):
        assert batch.x.shape[0] * batch.x.shape[1] <= 1.25 * 600  # lhotse ends a batch when one more of its longest would be too much
        assert batch.padding_share == pytest.approx(1 - float(batch.x_lens.sum()) / batch.x[..., 0].numel())
        shares.append(batch.padding_share)
    unsorted = [collate(list(load_cuts(manifest))[i : i + 3], INVENTORY).padding_share for i in range(0, 30, 3)]
    assert sum(shares) / len(shares) < 0.7 * sum(unsorted) / len(unsorted)  # buckets hold like lengths


def test_weights(manifest, other):
    for weight, count in ((0.3, 9), (1.0, 30), (2.0, 60)):
        taken = [flat(epoch) for epoch in epochs(make(Source(manifest, weight), other), 4)]
        for epoch in taken:
            assert len(set(epoch)) == len(epoch)
            assert sum(name.startswith("u") for name in epoch) == count
            assert sum(name.startswith("o") for name in epoch) == 10
        uses = Counter(name.partition("-again")[0] for epoch in taken for name in epoch if name.startswith("u"))
        assert max(uses.values()) - min(uses.values(), default=0) <= 1 or weight < 1
        if weight == 0.3:
            assert len(uses) == 30  # another part each epoch, so that four epochs have seen everything
            assert max(uses.values()) == 2


def test_a_small_weight_still_gives_an_utterance(manifest, other):
    assert sum(name.startswith("o") for name in flat(epochs(make(manifest, Source(other, 0.001)), 1)[0])) == 1


def test_an_epoch_without_a_whole_step_is_told(manifest):
    with pytest.raises(RecipeError, match=r"training data: expected at least one step per epoch, found 30 utterances, 0\.0\d+ h"):
        next(make(manifest, accum=1000).steps())


def test_collate(manifest):
    cuts = list(load_cuts(manifest))[:3]
    batch = collate(cuts, INVENTORY)
    assert batch.ids == ["u000", "u001", "u002"]
    assert batch.x_lens.tolist() == LENS[:3]
    assert batch.x.shape == (3, max(LENS[:3]), 80)
    for i, cut in enumerate(cuts):
        torch.testing.assert_close(batch.x[i, : LENS[i]], torch.from_numpy(cut.load_features()))
        assert not batch.x[i, LENS[i] :].any()
        assert batch.phones[i, : batch.phone_lens[i]].tolist() == INVENTORY.encode(cut.supervisions[0].custom["phones"])


def test_cuts_without_phonemes_or_features_are_told(manifest, tmp_path):
    cuts = list(load_cuts(manifest))
    cuts[0].supervisions[0].custom = None
    with pytest.raises(RecipeError, match=r"u000: expected phonemes in the manifest"):
        collate(cuts[:1], INVENTORY)
    cuts[1].features.storage_path = str(tmp_path / "gone.lca")
    with pytest.raises(RecipeError, match=r"features of u001: expected readable features"):
        collate(cuts[1:2], INVENTORY)


def test_features_that_cannot_be_read_stop_a_data_worker_with_one_line(manifest, tmp_path):
    cuts = list(load_cuts(manifest))
    for cut in cuts:
        cut.features.storage_path = str(tmp_path / "gone.lca")
    save_cuts(cuts, tmp_path / "broken.jsonl.gz")
    with pytest.raises(
        RecipeError, match=r"features of u\d+: expected readable features, found FileNotFoundError: .*gone.lca'?. Fix: run stage 1 again$"
    ):
        next(make(tmp_path / "broken.jsonl.gz", num_workers=1).steps())


@pytest.mark.parametrize(("long_weight", "times"), [(1.0, 0), (2.0, 1), (3.0, 2)])
def test_the_longer_half_comes_more_often(manifest, long_weight, times):
    lengths = {cut.id: cut.duration for cut in load_cuts(manifest)}
    longer = sorted(lengths, key=lambda name: (-lengths[name], name))[:15]
    for batches in epochs(make(manifest, long_weight=long_weight, accum=1), 2):
        counts = Counter(name.partition("-again")[0] for name in flat(batches))
        assert counts == Counter(lengths.keys()) + Counter(longer * times)


def test_half_a_time_more(manifest):
    found = [flat(batches) for batches in epochs(make(manifest, long_weight=1.5), 2)]
    assert [len(names) for names in found] == [38, 38]  # 30 and half of 15
    more = [{name.partition("-again")[0] for name in names if "-again" in name} for names in found]
    assert len(more[0] | more[1]) == 15


def test_long_ones_cannot_come_less_often(manifest):
    with pytest.raises(RecipeError, match=r"train\.long_weight: expected at least 1"):
        make(manifest, long_weight=0.5)


def test_eval_batches_cover_everything_once(manifest):
    cuts = load_cuts(manifest)
    batches = list(eval_batches(cuts, phone_batches(INVENTORY), 5.0))
    assert sorted(flat(batch.ids for batch in batches)) == sorted(cut.id for cut in cuts)
    lens = [length for batch in batches for length in batch.x_lens.tolist()]
    assert lens == sorted(lens, reverse=True)
    assert all(batch.x.shape[0] * batch.x.shape[1] <= 500 for batch in batches)
    assert [len(batch.ids) for batch in eval_batches(cuts, phone_batches(INVENTORY), 0.1)] == [1] * 30  # one that is too long stands alone


def test_sources(tmp_path):
    units = tmp_path / "mini" / "units"
    assert parse_sources("a  b=0.5", units) == [Source(units / "a.jsonl.gz"), Source(units / "b.jsonl.gz", 0.5)]
    assert parse_sources("aishell:train librispeech:train-clean-100=2", units) == [
        Source(tmp_path / "aishell" / "units" / "train.jsonl.gz"),
        Source(tmp_path / "librispeech" / "units" / "train-clean-100.jsonl.gz", 2.0),
    ]


@pytest.mark.parametrize("weight", ["0", "-1", "much", "nan", "inf"])
def test_wrong_weights(tmp_path, weight):
    with pytest.raises(RecipeError, match=f"--train a={weight}: expected a positive weight after =, found {weight}"):
        parse_sources(f"a={weight}", tmp_path)


@pytest.mark.parametrize("item", ["a=", "=0.5", "aishell:", "aishell:=2"])
def test_half_written_sources(tmp_path, item):
    with pytest.raises(RecipeError, match="--train"):
        parse_sources(item, tmp_path)


def test_no_source(tmp_path):
    with pytest.raises(RecipeError, match="--train: expected at least one split"):
        parse_sources("  ", tmp_path)
