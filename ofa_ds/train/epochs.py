"""How often a run has gone through each of its data sets: small ones come again and again."""

from __future__ import annotations

from collections.abc import Sequence

from ofa_ds.data.mixture import Drawn, Mixture


class Epochs:
    """Computed from the position in the stream, by whoever asks: nothing is counted along."""

    def __init__(self, mixture: Mixture, sets: Sequence[str], global_rows: int) -> None:
        """sets: their names; one empty name where there is but one."""
        self._mixture, self._sets, self._global_rows = mixture, list(sets), global_rows

    def at(self, step: int) -> dict[str, float]:
        """Epochs done after `step` steps, the one under way in part, as `epoch/FAMILY` or `epoch/FAMILY/SET`."""
        return {f"epoch/{self._name(each, '/')}": each.drawn / each.rows for each in self._drawn(step)}

    def begun(self, before: int, step: int) -> list[str]:
        """A line for each set that has begun an epoch whose number is a power of two between these two steps."""
        return [
            f"step {step}: {self._name(new, ' of ')} is in epoch {_epoch(new)} of its {new.rows} rows"
            for old, new in zip(self._drawn(before), self._drawn(step), strict=True)
            if _epoch(old).bit_length() < _epoch(new).bit_length() and _epoch(new) > 1
        ]

    def _drawn(self, step: int) -> list[Drawn]:
        return self._mixture.progress(step * self._global_rows)

    def _name(self, drawn: Drawn, between: str) -> str:
        name = self._sets[drawn.part]
        return f"{drawn.family}{between}{name}" if name else drawn.family


def _epoch(drawn: Drawn) -> int:
    """From 1 on, that its last row was of; 0 before the first."""
    return -(-drawn.drawn // drawn.rows)
