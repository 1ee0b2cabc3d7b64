"""Replicas of the adaptor and the language model, as one: a stream whose engine is lost goes on in another, and the engine is replaced."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from nim4.config import RecipeError
from nim4.serve.limits import Busy
from nim4.serve.metrics import Metrics
from nim4.serve.vllm_engine import EngineLost, NoRoom

PATIENCE_S = 8.0  # ours: so long a stream looks for another engine; more audio than that must not wait, see Limits.max_behind_s
AGAIN_S = 10.0  # ours: an engine that cannot be started is tried again after so long

Result = TypeVar("Result")

log = logging.getLogger("nim4")


class Engines:
    """All of them belong to one event loop, which their start must not hold up: streams on the others go on while a lost one is replaced.

    Args:
        starts: one function for each engine that is to be there, which starts it: VllmEngine.start of the same model folder, on devices of its own.
    """

    def __init__(self, starts: list[Callable[[], Awaitable[Any]]]):
        self.metrics = Metrics()  # replaced by the gateway's
        self._starts = starts
        self._there: dict[int, Any] = {}  # by number of its start
        self._starting: dict[int, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Starts all of them. Raises RecipeError if one cannot be started."""
        try:
            for number, start in enumerate(self._starts):
                self._there[number] = await start()
        except BaseException:
            await self.close()
            raise

    def gauges(self) -> dict[str, float]:
        """What the engines say of themselves, added up, and how many there are."""
        total: dict[str, float] = {"engines": len(self._there)}
        for engine in self._there.values():
            for name, value in engine.metrics().items():
                total[f"engine_{name}"] = total.get(f"engine_{name}", 0) + value
        return total

    async def open(self, tenant: str) -> Any:
        """A stream on the engine that has the fewest. Raises Busy if none has room for it."""
        reason = "no engine is there"
        for engine in self._by_load():
            try:
                return await engine.open(tenant)
            except NoRoom as error:
                reason = str(error)
            except EngineLost:
                self._lost(engine)
        raise Busy(reason)

    async def call(self, stream: Any, what: Callable[[], Awaitable[Result]], may_be_left_out: bool = False) -> Result | None:
        """The result of a call of a stream, which moves to another engine when its own is lost.

        Args:
            what: the call; made again after a move.
            may_be_left_out: where there is no room, as a partial text may, since the next one tells more anyway; the result is None then.
        Raises:
            Busy: if there is no engine, or no room for what may not be left out.
        """
        while True:
            try:
                return await what()
            except EngineLost:
                await self._move(stream)
            except NoRoom as error:
                self.metrics.count("no_room_total")
                if may_be_left_out:
                    return None
                raise Busy(str(error)) from error

    async def _move(self, stream: Any) -> None:
        self._lost(stream.engine)
        self.metrics.count("streams_moved_total")
        end_s = time.monotonic() + PATIENCE_S
        while True:
            for engine in self._by_load():
                try:
                    await engine.adopt(stream)
                    return
                except NoRoom:
                    continue
                except EngineLost:
                    self._lost(engine)
            if time.monotonic() > end_s:
                raise Busy("no engine is there, or none has room")
            await asyncio.sleep(0.1)

    def _by_load(self) -> list[Any]:
        return sorted(self._there.values(), key=lambda engine: engine.metrics()["streams"])

    def _lost(self, engine: Any) -> None:
        """Lets an engine go, and starts another in its place."""
        for number, other in list(self._there.items()):
            if other is engine:
                log.warning("engine %d is lost; another is started", number)
                del self._there[number]
                self.metrics.count("replicas_lost_total", part="engine")
                self._starting[number] = asyncio.get_running_loop().create_task(self._replace(number, engine))

    async def _replace(self, number: int, lost: Any) -> None:
        with suppress(Exception):  # it is lost: whatever its end says
            await lost.client.close()
        while True:
            try:
                self._there[number] = await self._starts[number]()
                log.info("engine %d is there again", number)
                return
            except (RecipeError, OSError) as error:
                log.warning("engine %d cannot be started: %s", number, error)
                await asyncio.sleep(AGAIN_S)

    async def close(self) -> None:
        """Ends all of them."""
        for task in self._starting.values():
            task.cancel()
        await asyncio.gather(*self._starting.values(), return_exceptions=True)  # what has begun to start is ended when it has
        for engine in self._there.values():
            with suppress(EngineLost):
                await engine.close()
