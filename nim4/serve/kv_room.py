"""Blocks of keys and values, counted before they are used: who finds none waits, and those who are still make room."""

import asyncio
from collections.abc import Awaitable, Callable


class NoRoom(Exception):
    """There is no room now; it may go better later."""


class Room:
    """The blocks of one engine; of one event loop.

    Args:
        num_blocks: that there are.
        block_size: tokens of a block.
        wait_s: seconds that somebody waits for blocks.
        make_room: asked, when there are too few, to let somebody go; returns whether anybody was.

    Attributes:
        used: blocks that are taken.
    """

    def __init__(self, num_blocks: int, block_size: int, wait_s: float, make_room: Callable[[], Awaitable[bool]]):
        self.num_blocks, self.block_size, self.used = num_blocks, block_size, 0
        self._wait_s, self._make_room = wait_s, make_room
        self._waiting: list[asyncio.Future[None]] = []

    def blocks(self, num_tokens: int) -> int:
        """How many hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def has(self, num_blocks: int) -> bool:
        """Whether so many are free."""
        return self.used + num_blocks <= self.num_blocks

    async def take_now(self, num_blocks: int) -> bool:
        """Takes blocks if they are free, or can be made so; returns whether it did."""
        while not self.has(num_blocks):
            if not await self._make_room():
                return False
        self.used += num_blocks
        return True

    async def take(self, num_blocks: int) -> None:
        """Takes blocks, and waits for them if need be. Raises NoRoom if they do not come, or are more than there are."""
        if num_blocks > self.num_blocks:
            raise NoRoom(f"{num_blocks} blocks of keys and values are wanted, and there are {self.num_blocks}")
        try:
            async with asyncio.timeout(self._wait_s):
                while not await self.take_now(num_blocks):
                    self._waiting.append(asyncio.get_running_loop().create_future())
                    await self._waiting[-1]
        except TimeoutError:
            free = self.num_blocks - self.used
            raise NoRoom(f"{num_blocks} blocks of keys and values were wanted for {self._wait_s:g} s, and {free} are free") from None

    def give(self, num_blocks: int) -> None:
        """Gives blocks back."""
        self.used -= num_blocks
        self.wake()

    def wake(self) -> None:
        """Lets those who wait look again, since there are more blocks, or somebody may be let go who was busy."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)
