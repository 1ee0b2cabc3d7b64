"""A process that serves for weeks: what keeps its memory at one size, and its threads from waiting for each other.

All of it is ours, and measured: benchmarks/serve_load.py --mixed.
"""

import ctypes
import gc
import os
import sys

# glibc's mallopt, from malloc.h
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
LARGE_BYTES = 1 << 20  # what is as large gets pages of its own, and they go back at once: between small things it would leave holes
NUM_ARENAS = 2  # of memory: each thread would have its own, and what it once took
PRIMITIVES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
NUM_PRIMITIVES = 128  # kernels that torch's convolutions keep, one for each shape; 1024 otherwise, which take hours to come together
SWITCH_S = 0.001  # so long a thread of Python keeps others waiting; five times as long otherwise, and the model waits at each of its operations


def prepare() -> None:
    """To be called before the model is read, in a process that does nothing but serve."""
    os.environ.setdefault(PRIMITIVES, str(NUM_PRIMITIVES))  # oneDNN reads it when torch first asks for a kernel
    sys.setswitchinterval(SWITCH_S)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:  # Linux
        for parameter, value in ((MMAP_THRESHOLD, LARGE_BYTES), (TRIM_THRESHOLD, LARGE_BYTES), (ARENA_MAX, NUM_ARENAS)):
            mallopt(parameter, value)


def settle() -> None:
    """To be called when all that stays is there: the collector of cycles, which holds up all threads, need not look through it again."""
    gc.collect()
    gc.freeze()
