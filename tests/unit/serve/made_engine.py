"""An engine with the interface of nim4/serve/vllm_engine.py whose streams are the library's own: right texts without vLLM, and faults on demand."""

from types import SimpleNamespace

import torch

from nim4.decode.encoder import Chunk
from nim4.decode.streaming import Recogniser
from nim4.serve.vllm_engine import Counts, EngineLost, NoRoom, Text


class Heard:
    """The encoder that a session is given: what was appended."""

    def __init__(self, vocab_size):
        self.waiting, self.phones, self._vocab_size = [], [], vocab_size

    def append(self, frames, num_phones):
        labels = torch.full((len(frames), 1), int(num_phones > len(self.phones)))
        log_probs = torch.zeros(len(frames), self._vocab_size).scatter(1, labels, 1.0)
        self.waiting.append(Chunk(frames[None], log_probs, torch.zeros(0, 80)))
        self.phones = [1] * num_phones

    def accepting(self, samples):
        chunks, self.waiting = self.waiting, []
        return chunks
        yield

    def finishing(self):
        return []
        yield


class MadeEngine:
    """`is_lost` and `is_full` may be set at any time; `opened` has the tenants of all streams so far."""

    def __init__(self, model):
        self.model, self.streams, self.is_lost, self.is_full = model, set(), False, False
        self.opened, self.adopted, self.aborted = [], 0, 0
        self.client = SimpleNamespace(close=self.close)

    def check(self, room=True):
        if self.is_lost:
            raise EngineLost("the engine's process is gone")
        if room and self.is_full:
            raise NoRoom("no blocks")

    async def open(self, tenant=""):
        self.check()
        self.opened.append(tenant)
        stream = MadeStream(self)
        self.streams.add(stream)
        return stream

    async def adopt(self, stream):
        self.check()
        stream.engine.streams.discard(stream)
        stream.engine = self
        stream.read_again()
        self.streams.add(stream)
        self.adopted += 1

    def metrics(self):
        return {"streams": len(self.streams), "kv_blocks_used": 7 * len(self.streams), "aborted": self.aborted}

    async def close(self):
        self.streams.clear()


class MadeStream:
    """Keeps the frames, as VllmStream does, and reads them again in another engine."""

    def __init__(self, engine):
        self.engine, self.appended, self.written, self.is_open = engine, [], [], True
        self.read_again()

    def read_again(self):
        """A session that has read and written what this one had."""
        model = self.engine.model
        self._heard = Heard(model.acoustic.config.vocab_size)
        self._session = Recogniser(model).session(encoder=self._heard)
        done = 0
        for after, hints in [*self.written, (len(self.appended), None)]:
            for chunk in self.appended[done:after]:
                self._read(*chunk)
            done = after
            if hints is not None:
                self._partial(hints)

    def _read(self, frames, num_phones):
        self._heard.append(frames, num_phones)
        self._session.append(torch.zeros(0).numpy())

    def _partial(self, hints):
        self._session._hotwords.hints = list(hints)
        return self._session.partial()

    async def append(self, frames, num_phones):
        assert self.is_open
        self.engine.check(room=False)
        assert frames.ndim == 2
        self.appended.append((frames, num_phones))
        self._read(frames, num_phones)

    async def partial(self, hints=()):
        assert self.is_open
        self.engine.check()
        self.written.append((len(self.appended), tuple(hints)))
        return self._text(self._partial(hints))

    async def final(self, hints=()):
        assert self.is_open
        self.engine.check()
        self._session._hotwords.hints = list(hints)
        self.is_open = False
        self.engine.streams.discard(self)
        return self._text(self._session.finalize())

    async def close(self):
        if self.is_open:
            self.is_open = False
            self.engine.aborted += 1
            self.engine.streams.discard(self)

    def _text(self, seen):
        counts = Counts(speech_tokens=seen.counts.speech_tokens, drafted=seen.counts.drafted, accepted=seen.counts.accepted)
        return Text(seen.text, (), seen.revision, seen.settled_chars, seen.is_final, counts)
