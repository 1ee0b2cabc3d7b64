"""Streams on vLLM, with transformers in the place of vLLM: the same texts as our own engine, blocks that are counted, engines that are lost.

What vLLM does with the requests is tested with vLLM itself, in test_vllm_engine.py.
"""

import asyncio
import shutil
from pathlib import Path

import pytest
import torch
from speech_pieces import heard, noise, on_our_engine
from tiny import INVENTORY, make_talkative, tiny_llm, tiny_speech_llm

from nim4.config import RecipeError
from nim4.model.asr import load_speech_llm
from nim4.model.llm import Llm, generate
from nim4.serve.kv_room import NoRoom, Room
from nim4.serve.vllm_client import Answer, EngineLost, EngineSettings
from nim4.serve.vllm_engine import VllmEngine

FRAMES = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("speech_llm")
    model = make_talkative(tiny_speech_llm(tiny_llm(root / "source", tie_word_embeddings=False)))
    model.save(root / "model", model.state_dict(), INVENTORY)
    return root / "model"


@pytest.fixture(scope="module")
def model(folder):
    return load_speech_llm(folder, torch.device("cpu"))[0]


class Client:
    """What VllmClient is to an engine; blocks are not looked after, `parts` are what open requests got."""

    speech_id, num_blocks, block_size = 263, 100, 16

    def __init__(self, model, num_blocks=100):
        self.model, self.tokenizer, self.num_blocks = model, model.tokenizer, num_blocks
        self.parts, self.prompts, self.closed, self.lost = [], [], 0, False
        self.gate = asyncio.Event()  # answers wait for it
        self.gate.set()
        self.aborted = set()

    async def check(self):
        if self.lost:
            raise EngineLost("gone")

    async def answer(self, name, prompt, limit, end, draft=()):
        await self.check()
        self.prompts.append(prompt)
        await self.gate.wait()
        if name in self.aborted:
            raise RuntimeError("the stream has ended")
        await self.check()
        embed, items = self.model.llm.get_input_embeddings(), iter(prompt.items)
        ids = prompt.ids[: len(prompt.ids) - len(draft)]
        speech = (next(items, None) if token == self.speech_id else None for token in ids)  # the model may write that token, too
        embeds = torch.cat([embed(torch.tensor([token])) if x is None else self.adapted(x) for token, x in zip(ids, speech, strict=True)])[None]
        llm = Llm(self.model.llm, self.tokenizer, "")
        written = generate(llm, embeds, torch.tensor([0]), [limit + len(draft)], end=end)[0]
        written = written if len(written) == limit + len(draft) else [*written, end]
        accepted = next((place for place, token in enumerate(draft) if written[place : place + 1] != [token]), len(draft))
        rest = written[accepted : accepted + 1] if accepted < len(draft) else written[accepted:]
        return Answer(accepted, rest, embeds.shape[1] + len(draft), 0)

    @torch.inference_mode()
    def adapted(self, frames):
        return self.model.adaptor(frames[None], torch.tensor([len(frames)]))[0][0]

    async def abort(self, name):
        self.aborted.add(name)

    def session(self, name):
        return Session(self)

    async def close(self):
        self.lost = True


class Session:
    def __init__(self, client):
        self.client = client

    async def send(self, prompt):
        await self.client.check()
        self.client.parts.append(prompt)
        return 0

    async def close(self):
        self.client.closed += 1


def engine_of(folder, model, num_blocks=100, **settings):
    return VllmEngine(folder, EngineSettings(**settings), Client(model, num_blocks))


@pytest.mark.parametrize("seed", range(2))
def test_texts_are_those_of_our_engine(folder, model, seed):
    samples, hints = noise(45_000 + 1000 * seed, seed), ("北京",) * seed

    async def run():
        return await heard(engine_of(folder, model), model, samples, hints)

    texts, ours = asyncio.run(run()), on_our_engine(model, samples, hints)
    for text, own in zip(texts, ours, strict=True):
        assert (text.text, text.revision, text.settled_chars, text.is_final) == (own.text, own.revision, own.settled_chars, own.is_final)
    assert len({text.text for text in texts}) > 2
    assert texts[-1].counts.speech_tokens == ours[-1].counts.speech_tokens
    assert (texts[-1].counts.drafted, texts[-1].counts.accepted) == (ours[-1].counts.drafted, ours[-1].counts.accepted)


def test_each_frame_is_sent_to_the_open_request_once_and_a_text_names_the_same_items(folder, model):
    async def run():
        engine = engine_of(folder, model)
        texts = await heard(engine, model, noise(40_000))
        return engine, texts

    engine, texts = asyncio.run(run())
    client, prefix = engine.client, engine.prompt.prefix
    assert client.parts[0].ids[: len(prefix)] == prefix
    assert sum(len(part.items) for part in client.parts) == len(client.parts)
    assert sum(-(-len(item) // 4) for part in client.parts for item in part.items) == texts[-1].counts.speech_tokens
    names = [name for part in client.parts for name in part.names]
    assert len(set(names)) == len(names)
    assert client.prompts[-1].names == names
    assert engine.counts.appended_tokens == len(prefix) + engine.counts.speech_tokens
    assert engine.metrics()["kv_blocks_used"] == 0
    assert not engine.streams
    assert client.closed == 1


def test_frames_that_fill_no_token_wait_for_the_next_or_for_the_end(folder, model):
    async def run():
        engine = engine_of(folder, model)
        stream = await engine.open()
        for part in (FRAMES[:3], FRAMES[3:6], FRAMES[6:7]):
            await stream.append(part, 1)
        before = stream.counts.speech_tokens
        await stream.final()
        return before, engine.client.prompts[-1].items

    before, items = asyncio.run(run())
    assert before == 1
    assert [item.tolist() for item in items] == [FRAMES[:4].tolist(), FRAMES[4:7].tolist()]


def test_frames_of_another_model_are_refused_and_the_stream_goes_on(folder, model):
    async def run():
        stream = await engine_of(folder, model).open()
        with pytest.raises(ValueError, match=r"\(S, 16\).*\(16, 20\)"):
            await stream.append(torch.zeros(16, 20), 1)
        await stream.append(FRAMES, 1)
        return await stream.final()

    assert asyncio.run(run()).counts.speech_tokens == 4


def test_an_utterance_that_is_too_long_is_refused_before_it_is_heard(folder, model):
    async def run():
        stream = await engine_of(folder, model, max_tokens=200).open()
        await stream.append(FRAMES, 1)
        with pytest.raises(ValueError, match="at most 200 tokens"):
            await stream.append(FRAMES.repeat(10, 1), 2)
        return await stream.final()

    assert asyncio.run(run()).counts.speech_tokens == 4


def test_a_stream_that_is_still_makes_room_and_comes_back_with_the_same_text(folder, model):
    samples = noise(40_000)

    async def run():
        engine = engine_of(folder, model, num_blocks=15)
        other = await engine.open()
        await other.append(FRAMES, 1)
        used = engine.room.used
        texts = await heard(engine, model, samples, between=lambda: other.append(FRAMES, 1))
        await other.close()
        return engine, used, texts

    engine, used, texts = asyncio.run(run())
    assert used
    assert engine.counts.evicted >= 2
    assert engine.counts.resumed >= 2
    assert engine.counts.aborted == 1
    assert engine.room.used == 0
    assert [text.text for text in texts] == [own.text for own in on_our_engine(model, samples)]


def test_a_text_that_finds_no_room_is_refused_and_may_be_asked_for_again(folder, model):
    async def run():
        engine = engine_of(folder, model, wait_s=0.05)
        stream = await engine.open()
        await stream.append(FRAMES, 1)
        others = engine.room.num_blocks - engine.room.used
        await engine.room.take(others)
        with pytest.raises(NoRoom, match=r"wanted for 0.05 s"):
            await stream.final()
        engine.room.give(others)
        final = await stream.final()
        return final, engine.room.used

    final, used = asyncio.run(run())
    assert final.is_final
    assert used == 0


def test_who_waits_for_room_gets_it_when_the_text_of_another_is_done(folder, model):
    async def run():
        engine = engine_of(folder, model, num_blocks=15, wait_s=30)
        busy, waits = await engine.open(), await engine.open()
        await busy.append(FRAMES, 1)
        await waits.append(FRAMES, 1)
        engine.client.gate.clear()
        first = asyncio.create_task(busy.partial())
        await asyncio.sleep(0.01)
        second = asyncio.create_task(waits.final())
        await asyncio.sleep(0.01)
        asked = len(engine.client.prompts)
        engine.client.gate.set()
        await asyncio.wait_for(asyncio.gather(first, second), 20)
        return asked, engine.counts.finals

    assert asyncio.run(run()) == (1, 1)


def test_new_streams_are_refused_when_all_are_in_use_or_blocks_are_out(folder, model):
    async def run():
        engine = engine_of(folder, model, max_streams=1)
        stream = await engine.open()
        with pytest.raises(NoRoom, match="all 1 streams"):
            await engine.open()
        await stream.close()
        await engine.room.take(engine.room.num_blocks)
        with pytest.raises(NoRoom, match="100 of 100 blocks"):
            await engine.open()

    asyncio.run(run())


def test_a_client_that_goes_in_the_middle_of_a_text_leaves_nothing(folder, model):
    async def run():
        engine = engine_of(folder, model)
        stream = await engine.open()
        await stream.append(FRAMES, 1)
        engine.client.gate.clear()
        waiting = asyncio.create_task(stream.partial())
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(stream.close())
        await asyncio.sleep(0.01)
        engine.client.gate.set()
        await closing
        with pytest.raises(RuntimeError, match="ended"):
            await waiting
        with pytest.raises(RuntimeError, match="ended"):
            await stream.append(FRAMES, 2)
        await stream.close()
        return engine

    engine = asyncio.run(run())
    assert engine.room.used == 0
    assert not engine.streams
    assert engine.counts.aborted == 1


def test_a_cancelled_call_may_be_made_again(folder, model):
    async def run():
        engine = engine_of(folder, model)
        stream = await engine.open()
        await stream.append(FRAMES, 1)
        engine.client.gate.clear()
        waiting = asyncio.create_task(stream.final())
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        engine.client.gate.set()
        final = await stream.final()
        return final, engine.room.used

    final, used = asyncio.run(run())
    assert final.is_final
    assert used == 0


def test_a_stream_of_a_lost_engine_goes_on_in_another(folder, model):
    samples = noise(45_000)

    async def run():
        first, second = engine_of(folder, model), engine_of(folder, model)
        count = 0

        async def lose_it():
            nonlocal count
            count += 1
            if count == 2:
                first.client.lost = True
                (stream,) = first.streams
                with pytest.raises(EngineLost):
                    await stream.append(FRAMES, 99)
                await second.adopt(stream)

        texts = await heard(first, model, samples, between=lose_it)
        with pytest.raises(EngineLost):
            await first.open()
        return first, second, texts

    first, second, texts = asyncio.run(run())
    assert first.room.used == second.room.used == 0
    assert not first.streams
    assert [text.text for text in texts] == [own.text for own in on_our_engine(model, samples)]
    assert len(second.client.parts[0].items) > 1  # all that was heard before


def test_an_engine_takes_its_own_model_only(folder, model, tmp_path):
    async def run():
        return engine_of(folder, model)

    engine = asyncio.run(run())
    shutil.copytree(folder, tmp_path / "same")
    engine.check_model(tmp_path / "same")
    other = tiny_speech_llm(tiny_llm(tmp_path / "llm", tie_word_embeddings=False), seed=1)
    other.save(tmp_path / "other", other.state_dict(), INVENTORY)
    with pytest.raises(RecipeError, match="another of the same width"):
        engine.check_model(tmp_path / "other")
    narrow = tiny_speech_llm(tiny_llm(tmp_path / "llm", tie_word_embeddings=False), dim=8)
    narrow.save(tmp_path / "narrow", narrow.state_dict(), INVENTORY)
    with pytest.raises(RecipeError, match=r"expected the model of the engine, .*, of width 16, found another, of width 8. Fix: name one model"):
        engine.check_model(tmp_path / "narrow")
    with pytest.raises(RecipeError, match="expected a model folder"):
        engine.check_model(Path("nowhere"))


def test_room_is_given_to_those_who_wait():
    async def nobody():
        return False

    async def run():
        room = Room(10, 16, 5.0, nobody)
        await room.take(8)
        waiting = [asyncio.create_task(room.take(5)) for _ in range(2)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        room.give(3)
        await asyncio.sleep(0.01)
        assert sum(task.done() for task in waiting) == 1
        room.give(5)
        await asyncio.gather(*waiting)
        assert room.used == 10
        with pytest.raises(NoRoom, match="11 blocks"):
            await room.take(11)
        assert [room.blocks(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]

    asyncio.run(run())
