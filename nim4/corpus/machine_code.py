"""Loops that are compiled. The only door to numba.

The code is made when a function is first called, and kept beside its module for the next process.
"""

import numba

jit = numba.njit(cache=True, nogil=True)
