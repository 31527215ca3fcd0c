"""Which row comes when: functions of (seed, position) without state: nothing to save, nothing to resume.

The stream of all families has positions 0, 1, 2, ...; step s of a run takes positions s * global_rows ... . A family's
rows go by in epochs of its own, each a permutation of all of them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

ROUNDS = 6
BLOCK = 1 << 17
"""Indices permuted at a time, in 2 MB: few enough for the processor's cache, many enough for numpy's calls."""


class Permutation:
    """A shuffle of range(n) that is computed, not stored: `permutation[i]` -> int, `permutation.at(i_K)` -> int64 [K].

    A Feistel network of 6 rounds on the bits of n - 1; a value past the end goes through it again until it is inside.
    """

    def __init__(self, n: int, seed: int, epoch: int, family: int = 0) -> None:
        """Different (seed, epoch, family) give unrelated orders. Raises ValueError for n < 1 or below zero."""
        if n < 1 or n > 1 << 62 or min(seed, epoch, family) < 0:
            raise ValueError(f"want n >= 1 and seed, epoch >= 0, got n {n}, seed {seed}, epoch {epoch}")
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._low, self._high = bits // 2, bits - bits // 2
        self._dtype = np.uint32 if bits <= 32 else np.uint64
        self._mixed_bits = np.dtype(self._dtype).itemsize * 8
        words = np.random.SeedSequence([seed, epoch, family]).generate_state(2 * ROUNDS, np.uint64)
        self._keys = words.astype(self._dtype).reshape(ROUNDS, 2)
        self._keys[:, 0] |= self._dtype(1)  # multiplying by an odd number loses nothing

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        return int(self.at(np.array([i]))[0])

    def at(self, index_K: np.ndarray) -> np.ndarray:
        """Where each index goes. Raises IndexError for one outside range(n)."""
        if index_K.size and (index_K.min() < 0 or index_K.max() >= self.n):
            raise IndexError(f"want indices of range({self.n}), got {index_K.min()} ... {index_K.max()}")
        out_K = np.empty(index_K.shape, np.int64)
        scratch = np.empty((3, min(index_K.size, BLOCK)), self._dtype)
        for start in range(0, index_K.size, BLOCK):
            value = index_K[start : start + BLOCK].astype(self._dtype)
            self._network(value, scratch)
            again = np.flatnonzero(value >= self.n)
            while again.size:
                changed = value[again]
                self._network(changed, scratch)
                value[again] = changed
                again = again[changed >= self.n]
            out_K[start : start + BLOCK] = value
        return out_K

    def _network(self, value: np.ndarray, scratch: np.ndarray) -> None:
        """A bijection of 0 ... 2^bits - 1, in place: each round changes one half by a function of the other.

        scratch: memory as long as `value` or longer; new memory for each of 40 operations took 3 times as long.
        """
        left, right, mixed = scratch[:, : value.size]
        low, high = self._low, self._high
        np.right_shift(value, self._dtype(low), out=left)
        np.bitwise_and(value, self._dtype((1 << low) - 1), out=right)
        for k in range(ROUNDS):
            changed = high if k % 2 == 0 else low  # the halves change places each round
            self._mix(right, k, changed, mixed, value)
            left ^= mixed
            left, right = right, left
        np.left_shift(left, self._dtype(low), out=value)
        value |= right

    def _mix(self, half: np.ndarray, k: int, bits: int, mixed: np.ndarray, other: np.ndarray) -> None:
        """-> mixed; what is in `other` is lost."""
        np.multiply(half, self._keys[k, 0], out=mixed)
        mixed += self._keys[k, 1]
        np.right_shift(mixed, self._dtype(self._mixed_bits // 2), out=other)
        mixed ^= other
        mixed *= self._dtype(_ODD & (1 << self._mixed_bits) - 1)
        mixed >>= self._dtype(self._mixed_bits - bits)


_ODD = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio, odd also in its lower 32 bits."""


@lru_cache(64)  # making the keys takes longer than permuting the few rows of a micro-batch
def permutation(n: int, seed: int, epoch: int, family: int = 0) -> Permutation:
    """The order of epoch `epoch` of a family of n rows."""
    return Permutation(n, seed, epoch, family)
