"""Statistics of shards as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ofa_ds.data.tools.stats import Stats
from ofa_ds.storage.sizes import size_text

QUANTILES = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}


def quantile(counts: Counter[int], share: float) -> int:
    """The smallest value that at least `share` of all are not above."""
    left = share * counts.total()
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return value
    return max(counts)


def mean(counts: Counter[int]) -> float:
    return sum(value * count for value, count in counts.items()) / counts.total()


def as_json(stats: Stats) -> dict[str, Any]:
    """Every number of the table, and the counts of each value."""
    pictures, cover = stats.pictures, stats.coverage
    found: dict[str, Any] = {
        "shards": str(stats.path),
        "fingerprint": stats.manifest.fingerprint,
        "rows": {
            kind: {"rows": rows.rows, "picture_bytes": rows.picture_bytes, "text_bytes": rows.text_bytes}
            for kind, rows in stats.kinds.items()
        },
        "values": {
            kind: {name: _summary(counts) for name, counts in sorted(rows.values.items())}
            for kind, rows in stats.kinds.items()
        },
        "pictures": {"rows": pictures.rows, "different": pictures.different, "most": pictures.most},
    }
    if cover is not None:
        numbers = {name: getattr(cover, name) for name in ("texts", "characters", "tokens", "unknown", "size")}
        found["vocabulary"] = numbers | {"used": len(cover.used)}
    return found


def _summary(counts: Counter[int]) -> dict[str, Any]:
    spread = {name.replace(" %", "_percent"): quantile(counts, share) for name, share in QUANTILES.items()}
    return spread | {"mean": mean(counts), "counts": {str(value): counts[value] for value in sorted(counts)}}


def table(stats: Stats) -> str:
    lines = [f"{'rows of':34}{'rows':>12}{'share':>8}{'pictures':>12}{'texts':>12}"]
    total = sum(rows.rows for rows in stats.kinds.values())
    for kind, rows in stats.kinds.items():
        sizes = f"{size_text(rows.picture_bytes):>12}{size_text(rows.text_bytes):>12}"
        lines.append(f"{kind:34}{rows.rows:>12,}{rows.rows / total:>8.1%}{sizes}")
    lines += ["", f"{'values':44}{'':2}{''.join(f'{name:>9}' for name in (*QUANTILES, 'mean'))}"]
    for kind, rows in stats.kinds.items():
        for name, counts in sorted(rows.values.items()):
            spread = "".join(f"{quantile(counts, share):>9,}" for share in QUANTILES.values())
            lines.append(f"{f'{kind}, {name}':44}  {spread}{mean(counts):>9,.1f}")
    return "\n".join([*lines, "", *_totals(stats)])


def _totals(stats: Stats) -> list[str]:
    pictures, cover, lines = stats.pictures, stats.coverage, []
    if pictures.rows:
        more = f"{pictures.rows - pictures.different:,} rows repeat one, {pictures.most:,} rows have the most frequent"
        lines.append(f"pictures: {pictures.different:,} different in {pictures.rows:,} rows; {more}")
    if cover is not None and cover.tokens:
        per = cover.characters / cover.tokens
        used = f"{len(cover.used):,} of {cover.size:,} text entries occur"
        share = f"{cover.unknown:,} of {cover.tokens:,} tokens are <unk> ({cover.unknown / cover.tokens:.3%})"
        lines.append(f"vocabulary: {per:.2f} characters a token; {share}; {used}")
    return [*lines, f"fingerprint {stats.manifest.fingerprint}"]
