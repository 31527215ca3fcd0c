"""Which row comes when: functions of (seed, position) without state: nothing to save, nothing to resume.

The stream of all families has positions 0, 1, 2, ...; step s of a run takes positions s * global_rows ... . A family's
rows go by in epochs of its own, each a permutation of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
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


def pattern(weights: tuple[int, ...]) -> np.ndarray:
    """Families in turn, int8 [sum(weights)]: over any prefix of its repetition |drawn - due| < 1 for each.

    Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980): of the families that may be
    drawn without running ahead, the one that would first fall behind.
    """
    total = sum(weights)
    shares = [Fraction(weight, total) for weight in weights]
    slack = Fraction(1, max(2 * len(weights) - 2, 1))
    drawn = [0] * len(weights)
    order = np.empty(total, np.int8)
    for place in range(total):
        debts = [share * (place + 1) - count for share, count in zip(shares, drawn, strict=True)]
        ready = [k for k, debt in enumerate(debts) if debt >= slack]
        order[place] = chosen = min(ready, key=lambda k: (1 - slack - debts[k]) / shares[k])
        drawn[chosen] += 1
    return order


class Mixture:
    """The endless stream of rows of all families. Picklable; depends on its arguments alone.

    counts: rows of each family that is there. weights: rows drawn of each, relative to each other. Families of
    weight 0, and families that are not in counts, are left out.
    """

    def __init__(self, counts: Mapping[str, int], weights: Mapping[str, int], seed: int) -> None:
        """Raises ValueError where nothing is left to draw."""
        self.families = tuple(family for family in weights if weights[family] > 0 and counts.get(family, 0) > 0)
        if not self.families:
            raise ValueError(
                f"data.mix {dict(weights)} draws nothing from shards that have {dict(counts)} rows; "
                "give a family that is there a positive weight"
            )
        self.counts = {family: counts[family] for family in self.families}
        self.seed = seed
        self._number = {family: tuple(weights).index(family) for family in self.families}
        divisor = math.gcd(*(weights[family] for family in self.families))
        self._weights = tuple(weights[family] // divisor for family in self.families)
        self._pattern = pattern(self._weights)
        drawn = self._pattern[:, None] == np.arange(len(self.families))
        self._before = (np.cumsum(drawn, 0) - drawn)[np.arange(len(self._pattern)), self._pattern]

    def rows(self, start: int, stop: int) -> list[tuple[str, int, int]]:
        """(family, epoch, row of the family) at stream positions start ... stop - 1."""
        number_K, epoch_K, row_K = self.draw(start, stop)
        names = [self.families[number] for number in number_K]
        return list(zip(names, epoch_K.tolist(), row_K.tolist(), strict=True))

    def draw(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `rows`, in blocks: index into `families` int8 [K], epoch int64 [K], row int64 [K]."""
        if not 0 <= start <= stop:
            raise ValueError(f"want stream positions 0 <= start <= stop, got {start} and {stop}")
        turn_K, place_K = np.divmod(np.arange(start, stop), len(self._pattern))
        number_K = self._pattern[place_K]
        count_K = turn_K * np.array(self._weights)[number_K] + self._before[place_K]
        epoch_K, row_K = np.divmod(count_K, np.array([self.counts[family] for family in self.families])[number_K])
        for number, family in enumerate(self.families):
            mine = number_K == number
            for epoch in np.unique(epoch_K[mine]):
                at = mine & (epoch_K == epoch)
                order = permutation(self.counts[family], self.seed, int(epoch), self._number[family])
                row_K[at] = order.at(row_K[at])
        return number_K, epoch_K, row_K
