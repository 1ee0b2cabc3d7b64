"""Made speech, streamed to an engine on vLLM and to our own; and a model that vLLM takes."""

import numpy as np
from tiny import INVENTORY, make_talkative, tiny_llm, tiny_speech_llm

from nim4.decode.encoder import StreamingEncoder, spoken
from nim4.decode.streaming import DEPLOYED, Recogniser


def noise(num_samples, seed=0):
    """Noise whose loudness and pitch change, so that phonemes do."""
    rng = np.random.default_rng(seed)
    time = np.arange(num_samples) / 16_000
    loudness = 0.05 * (1 + np.sin(9 * time))
    return (loudness * (rng.standard_normal(num_samples) + np.sin(2000 * time * (1 + np.sin(3 * time))))).clip(-1, 1).astype(np.float32)


async def heard(engine, model, samples, hints=(), between=None, tenant=""):
    """Partials after each chunk and the final text of a stream; `between` is awaited after each partial."""
    encoder, texts = StreamingEncoder(model.acoustic, DEPLOYED), []
    stream = await engine.open(tenant)
    for piece in spoken(samples, encoder):
        for chunk in encoder.accept(piece):
            await stream.append(chunk.frames[0].clone(), len(encoder.phones))
        texts.append(await stream.partial(hints))
        if between is not None:
            await between()
    for chunk in encoder.finish():
        await stream.append(chunk.frames[0].clone(), len(encoder.phones))
    return [*texts, await stream.final(hints)]


def on_our_engine(model, samples, hints=()):
    """The same of nim4/decode/streaming.py."""
    session, texts = Recogniser(model, DEPLOYED).session(hints), []
    for piece in spoken(samples, session):
        session.append(piece)
        texts.append(session.partial())
    return [*texts, session.finalize()]


def make_folder(folder):
    """The folder of a tiny, random model with heads of a width that vLLM has on a CPU."""
    model = make_talkative(tiny_speech_llm(tiny_llm(folder / "source", tie_word_embeddings=False, head_dim=32)))
    model.save(folder / "model", model.state_dict(), INVENTORY)
    return folder / "model"
