"""The table that `ofa-ds evaluate` prints."""

from __future__ import annotations

from typing import Any

from ofa_ds.tasks.judges import TOKEN_ACCURACY, is_share

COLUMNS = ("own", "blind", "gain", "grey", "shuffled", "constant")
_WIDTH = 34


def format_table(result: dict[str, Any]) -> str:
    """A line per loss and score of what `evaluate` returns. Shares in percent, losses in nats per token."""
    lines = [
        f"{result['checkpoint']}, step {result['step']}, on {result['shards']}: {result['seconds']} s",
        "blind: the best of a grey picture, another row's picture and the best constant answer; gain: own beside blind",
        "",
        f"{'':{_WIDTH}}" + "".join(f"{name:>10}" for name in COLUMNS),
    ]
    for task, judged in result["tasks"].items():
        lines.append(f"{task} ({judged['examples']})")
        lines.append(_line("loss", judged["loss"], share=False))
        for name, values in judged["scores"].items():
            lines.append(_line(name, values, share=is_share(name)))
        if not judged["scores"]:
            lines.append(_line(TOKEN_ACCURACY, judged["token_accuracy"]))
        for kind, values in judged.get("by_type", {}).items():
            lines.append(_line(f"  {kind} ... ({values['examples']})", values))
    return "\n".join(lines)


def _line(name: str, values: dict[str, float | None], *, share: bool = True) -> str:
    return f"  {name:{_WIDTH - 2}}" + "".join(f"{_cell(values[column], share):>10}" for column in COLUMNS)


def _cell(value: float | None, share: bool) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if share else f"{value:.3f}"
