"""Decoding in several processes: the same as in one, in order, and no error is lost."""

import os
import signal
from functools import partial

import pytest
import torch
from tiny import INVENTORY, tiny_model

from nim4.config import RecipeError
from nim4.corpus.manifest import load_cuts
from nim4.decode.ctc import offline_log_probs, stream_cuts
from nim4.decode.offline import decode_cuts
from nim4.decode.processes import in_processes, processes_of_one_thread
from nim4.model.conformer import Context


def test_results_come_in_order_and_from_other_processes():
    offset = 1000  # a closure is inherited, not sent
    results = list(in_processes(lambda item: (item + offset, os.getpid(), torch.get_num_threads()), range(40), 2))
    assert [result for result, _, _ in results] == list(range(1000, 1040))
    assert os.getpid() not in {process for _, process, _ in results}
    assert {threads for _, _, threads in results} == {1}


@pytest.mark.parametrize(("num_items", "num_processes"), [(3, 1), (1, 4), (0, 4)])
def test_one_item_or_one_process_stays_here(num_items, num_processes):
    assert list(in_processes(lambda item: os.getpid(), range(num_items), num_processes)) == [os.getpid()] * num_items


def test_a_cpu_has_a_process_for_each_thread_and_a_gpu_one():
    torch.set_num_threads(2)
    assert processes_of_one_thread(torch.device("cuda")) == 1
    assert torch.get_num_threads() == 2
    assert processes_of_one_thread(torch.device("cpu")) == 2
    assert torch.get_num_threads() == 1


def test_what_a_worker_raises_is_raised():
    def work(item):
        if item == 3:
            raise RecipeError("here", expected="good", found=item, fix="mend it")
        return item

    with pytest.raises(RecipeError, match=r"^here: expected good, found 3\. Fix: mend it$"):
        list(in_processes(work, range(6), 2))


def test_a_killed_worker_is_told():
    with pytest.raises(RecipeError, match="parallel work: expected all processes to live"):
        list(in_processes(lambda item: os.kill(os.getpid(), signal.SIGKILL), range(4), 2))


@pytest.fixture
def cuts(units):
    """Six utterances, one of them without its audio."""
    cuts = list(load_cuts(units / "train.jsonl.gz"))[:6]
    cuts[2].recording.sources[0].source = "/nowhere.wav"
    return cuts


def facts(decoded):
    return [(row.cut.id, row.error, row.result, [(heard_s, phones) for heard_s, _, phones in row.shown]) for row in decoded]


def test_streams_and_batches_are_the_same_in_two_processes(cuts):
    model = tiny_model()

    def phones(log_probs):
        return INVENTORY.decode(log_probs.argmax(-1))

    def decode(recordings):
        return [phones(log_probs) for log_probs in offline_log_probs(model, recordings)]

    for decoder in (partial(stream_cuts, cuts, model, Context(4, 1), phones), partial(decode_cuts, cuts, 2.0, decode)):
        alone, together = facts(decoder(num_processes=1)), facts(decoder(num_processes=2))
        assert together == alone
        assert [name for name, error, _, _ in together if error] == [cuts[2].id]
        assert any(result for _, _, result, _ in together)
