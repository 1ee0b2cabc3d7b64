"""Our model inside vLLM: the same texts as our own engine, and what is read, adapted and sent is counted. Needs vLLM: utils/check_vllm.sh."""

import asyncio
import multiprocessing

import pytest
import torch
from speech_pieces import heard, make_folder, noise, on_our_engine
from tiny import INVENTORY, make_talkative, tiny_llm, tiny_speech_llm

from nim4.config import RecipeError
from nim4.decode.encoder import StreamingEncoder
from nim4.decode.streaming import DEPLOYED
from nim4.model.asr import load_speech_llm
from nim4.serve.vllm_client import EngineLost, EngineSettings, SpeechPrompt
from nim4.serve.vllm_engine import NoRoom, VllmEngine

pytest.importorskip("vllm")
PREFIX_TOKENS, BLOCK = 64, 32
AFTER_A_MISTAKE = 8  # tokens that are written behind a wrong draft before vLLM has been told to stop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("speech_llm"))


@pytest.fixture(scope="module")
def model(folder):
    return load_speech_llm(folder, torch.device("cpu"))[0]


@pytest.fixture(scope="module")
def run():
    """Runs a coroutine in the one event loop that the engine belongs to."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def engine(folder, run):
    engine = run(VllmEngine.start(folder, EngineSettings(max_streams=8, max_tokens=1024, num_blocks=60, wait_s=20)))
    yield engine
    run(engine.close())


def counted(run, engine, work):
    """What a coroutine returns, and what the model has counted meanwhile."""
    before = run(engine.client.counts())
    result = run(work)
    after = run(engine.client.counts())
    return result, {name: after[name] - before.get(name, 0) for name in after}


@pytest.mark.parametrize("seed", range(3))
def test_texts_are_those_of_our_engine_and_nothing_is_read_twice(engine, model, run, seed):
    samples, hints = noise(50_000 + 3000 * seed, seed), ("北京",) * (seed == 2)
    texts, done = counted(run, engine, heard(engine, model, samples, hints))
    ours = on_our_engine(model, samples, hints)
    assert [text.text for text in texts] == [own.text for own in ours]
    assert len({text.text for text in texts}) > 2
    assert [(text.revision, text.settled_chars) for text in texts] == [(own.revision, own.settled_chars) for own in ours]
    counts = texts[-1].counts
    assert counts.accepted == ours[-1].counts.accepted
    assert counts.speech_tokens == ours[-1].counts.speech_tokens
    assert counts.appended_tokens <= PREFIX_TOKENS + counts.speech_tokens
    read = counts.appended_tokens + counts.prompt_tokens - counts.cached_tokens + counts.written_tokens - num_requests(texts)
    assert read <= done["tokens"] <= read + AFTER_A_MISTAKE * (counts.accepted < counts.drafted)
    assert done["adapted_items"] == num_items(model, samples)


def num_items(model, samples):
    """Chunks of a stream that fill speech tokens, and a tail that does not: each is adapted once, and none for a text."""
    encoder = StreamingEncoder(model.acoustic, DEPLOYED)
    lens = [chunk.frames.shape[1] for chunk in [*encoder.accept(samples), *encoder.finish()]]
    return sum(length >= 4 for length in lens) + (lens[-1] % 4 > 0)


def num_requests(texts):
    """Requests for texts: the first token of each is written by the pass that reads its prompt."""
    counts = texts[-1].counts
    return counts.partials + 1 + (counts.accepted < counts.drafted)


def test_a_partial_reads_a_block_and_its_own_ids_and_sends_no_frames(engine, model, run, monkeypatch):
    from nim4.serve import vllm_model

    sent = []
    core = engine.client._llm.engine_core
    add = core.add_request_async

    async def spy(request):
        sent.append(request)
        await add(request)

    async def speak():
        stream, generator = await engine.open(), torch.Generator().manual_seed(3)
        for number in range(12):
            await stream.append(torch.randn(16, engine.frame_dim, generator=generator), number + 1)
        return stream

    stream = run(speak())
    monkeypatch.setattr(core, "add_request_async", spy)
    made_ready = vllm_model.processed.copy()
    text, done = counted(run, engine, stream.partial())
    run(stream.close())
    suffix = len(engine.prompt.suffix(partial=True))
    assert done["tokens"] <= BLOCK + suffix + len(text.ids)
    assert done.get("adaptor_calls", 0) == 0
    assert vllm_model.processed == made_ready
    (request,) = sent
    assert [feature.data for feature in request.mm_features] == [None] * 12


def test_a_draft_that_was_read_before_is_not_taken_for_verified(engine, run):
    async def texts():
        stream = await engine.open()
        await stream.append(torch.randn(16, engine.frame_dim, generator=torch.Generator().manual_seed(4)), 1)
        suffix, wrong = engine.prompt.suffix(), [65, 66, 67] * (2 * BLOCK)
        written = [await stream._write(suffix, draft, 210) for draft in (wrong, wrong, [])]
        await stream.close()
        return written

    (first, _), (second, _), (plain, _) = run(texts())
    assert first == second == plain


def test_tenants_share_nothing(engine, run):
    async def first_chunk(tenant, seed):
        stream = await engine.open(tenant)
        await stream.append(torch.randn(16, engine.frame_dim, generator=torch.Generator().manual_seed(seed)), 1)
        await stream.close()
        return stream.counts.appended_tokens

    assert run(first_chunk("acme", 1)) == PREFIX_TOKENS + 4
    assert run(first_chunk("acme", 2)) == PREFIX_TOKENS + 4 - BLOCK * (PREFIX_TOKENS // BLOCK)
    assert run(first_chunk("other", 3)) == PREFIX_TOKENS + 4


def test_many_streams_of_two_tenants_at_once_get_what_each_gets_alone(engine, model, run):
    signals = [noise(30_000 + 4000 * number, number) for number in range(4)]

    async def together():
        return await asyncio.gather(*(heard(engine, model, samples, tenant="ab"[number % 2]) for number, samples in enumerate(signals)))

    for texts, samples in zip(run(together()), signals, strict=True):
        assert [text.text for text in texts] == [own.text for own in on_our_engine(model, samples)]


def test_streams_share_blocks_that_are_too_few_for_all(engine, model, run):
    signals = [noise(70_000, number) for number in range(4)]

    async def together():
        taken = engine.room.num_blocks - 14
        await engine.room.take(taken)
        try:
            return await asyncio.gather(*(heard(engine, model, samples) for samples in signals))
        finally:
            engine.room.give(taken)

    before = engine.counts.evicted + engine.counts.resumed
    for texts, samples in zip(run(together()), signals, strict=True):
        assert [text.text for text in texts] == [own.text for own in on_our_engine(model, samples)]
    assert engine.counts.evicted + engine.counts.resumed > before
    assert engine.room.used == 0


def test_without_blocks_a_text_is_refused_and_may_be_asked_for_again(engine, model, run, monkeypatch):
    monkeypatch.setattr(engine.room, "_wait_s", 0.2)

    async def refused():
        stream = await engine.open()
        await stream.append(torch.randn(16, engine.frame_dim, generator=torch.Generator().manual_seed(6)), 1)
        free = engine.room.num_blocks - engine.room.used
        await engine.room.take(free)
        with pytest.raises(NoRoom, match=r"wanted for 0\.2 s"):
            await stream.final()
        with pytest.raises(NoRoom, match="blocks of keys and values are in use"):
            await engine.open()
        await engine.check()
        engine.room.give(free)
        return await stream.final()

    assert run(refused()).is_final
    assert engine.room.used == 0


def test_what_is_forgotten_by_vllm_is_sent_and_read_again(engine, model, run):
    samples = noise(50_000, 5)

    async def forgotten():
        for stream in list(engine.streams):
            await stream.evict()
        await engine.client._do(engine.client._llm.reset_mm_cache())
        assert await engine.client.forget()

    texts = run(heard(engine, model, samples, between=forgotten))
    assert [text.text for text in texts] == [own.text for own in on_our_engine(model, samples)]
    assert texts[-1].counts.resumed
    assert texts[-1].counts.appended_tokens > PREFIX_TOKENS + texts[-1].counts.speech_tokens


def test_a_client_that_goes_in_the_middle_of_a_text_leaves_no_block_behind(engine, run):
    async def go():
        stream = await engine.open()
        for number in range(8):
            await stream.append(torch.randn(16, engine.frame_dim), number + 1)
        held = await engine.client.forget()
        waiting = asyncio.create_task(stream.final())
        await asyncio.sleep(0.02)
        await stream.close()
        (error,) = await asyncio.gather(waiting, return_exceptions=True)
        freed = await engine.client.forget()
        return held, error, freed

    aborted = engine.counts.aborted
    held, error, freed = run(go())
    assert engine.counts.aborted == aborted + 1
    assert not held
    assert isinstance(error, RuntimeError)
    assert freed
    assert engine.room.used == 0


def test_frames_of_another_width_never_reach_the_model(engine, run):
    prompt = SpeechPrompt([*engine.prompt.prefix, engine.client.speech_id, *engine.prompt.suffix()], [torch.zeros(4, 20)], ["wide"], "")
    with pytest.raises(ValueError, match=r"\(S, 16\)"):
        run(engine.client.answer("wide", prompt, 4, engine.prompt.end))


def test_a_folder_whose_parts_do_not_fit_is_told_in_one_line(folder, run, tmp_path):
    other = make_talkative(tiny_speech_llm(tiny_llm(tmp_path / "llm", hidden_size=64, head_dim=32)))
    other.save(tmp_path / "model", other.state_dict(), INVENTORY)
    (tmp_path / "model" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(RecipeError, match=r"expected adaptor.down.bias of shape \(64,\).*found one of shape \(32,\)"):
        run(VllmEngine.start(tmp_path / "model"))


def test_an_engine_whose_process_is_killed_is_lost_and_its_stream_is_not(engine, model, run):
    """The last of those that need the engine."""

    async def speak():
        stream = await engine.open()
        await stream.append(torch.randn(16, engine.frame_dim), 1)
        return stream

    stream = run(speak())
    children = [child for child in multiprocessing.active_children() if child.name.startswith("EngineCore")]
    assert len(children) == 1
    children[0].kill()

    async def until_lost():
        async with asyncio.timeout(60):
            while True:
                await stream.append(torch.randn(16, engine.frame_dim), 2)

    with pytest.raises(EngineLost):
        run(until_lost())
    with pytest.raises(EngineLost):
        run(engine.check())
    run(stream.close())
    assert engine.room.used == 0
