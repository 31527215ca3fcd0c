"""What test_finetune_engine.py runs on ranks; light enough to import while tests are collected."""

from __future__ import annotations

from pathlib import Path

WORKER = Path(__file__).with_name("finetune_worker.py")
KINDS = "vtvtvvttvtvv"
"""Examples of a global batch."""
MICRO_ROWS = 2
STEPS = 3
STAGES = {1: (0, 3), 2: (0, 1, 2, 3)}
"""Of ZeRO, by world size."""
WEIGHTS = (1, 3)
"""Stages of engines that start from weights."""

CRITERIA = {
    "dropping": {
        "label_smoothing": 0.1, "drop_worst_ratio": 0.2, "drop_worst_after": 0, "drop_best_ratio": 0.1,
        "drop_best_after": 1,
    },
    "R-Drop, encouraging": {"label_smoothing": 0.1, "rdrop_alpha": 1.0, "encouraging": True},
}  # fmt: skip
"""Options of a `Criterion`; updates after which tokens are dropped are within the steps."""

FORMATS = ("huggingface", "fairseq", "modelscope", "deepspeed", "universal")
