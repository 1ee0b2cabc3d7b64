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

    Attributes:
        used: blocks that are taken.
        make_room: asked, when somebody finds too few, to let somebody else go; returns whether anybody was.
    """

    def __init__(self, num_blocks: int, block_size: int, wait_s: float):
        self.num_blocks, self.block_size, self.used = num_blocks, block_size, 0
        self.make_room: Callable[[], Awaitable[bool]] = self._nobody
        self._wait_s = wait_s
        self._changed = asyncio.Condition()

    @staticmethod
    async def _nobody() -> bool:
        return False

    def blocks(self, num_tokens: int) -> int:
        """How many hold so many tokens."""
        return -(-num_tokens // self.block_size)

    async def take(self, num_blocks: int) -> None:
        """Takes blocks, and waits for them if need be. Raises NoRoom if they do not come, or are more than there are."""
        if num_blocks > self.num_blocks:
            raise NoRoom(f"{num_blocks} blocks of keys and values are wanted, and there are {self.num_blocks}")
        try:
            async with asyncio.timeout(self._wait_s):
                while self.used + num_blocks > self.num_blocks:
                    if not await self.make_room():
                        async with self._changed:
                            if self.used + num_blocks > self.num_blocks:
                                await self._changed.wait()
        except TimeoutError:
            free = self.num_blocks - self.used
            raise NoRoom(f"{num_blocks} blocks of keys and values were wanted for {self._wait_s:g} s, and {free} are free") from None
        self.used += num_blocks

    async def give(self, num_blocks: int) -> None:
        """Gives blocks back."""
        self.used -= num_blocks
        async with self._changed:
            self._changed.notify_all()
