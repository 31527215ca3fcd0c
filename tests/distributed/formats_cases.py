"""What the format tests save and export; light enough to import while tests are collected."""

from __future__ import annotations

from pathlib import Path

WORKER = Path(__file__).with_name("formats_worker.py")

SAVED = [("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3), ("fp16", 3)]
"""(precision, ZeRO stage) of what two ranks train and save."""

EXPORTS = {
    1: [("fp32_2", "fp32", 1), ("fp32_3", "fp32", 3), ("bf16_2", "bf16", 1)],
    2: [(f"{precision}_{stage}", precision, stage) for precision, stage in SAVED] 
    + [("fp16_3", "fp16", 1), ("untrained", "fp32", 3), ("untrained", "fp32", 1)],
    3: [("fp32_3", "fp32", 1), ("fp32_1", "fp32", 2), ("bf16_1", "bf16", 3), ("bf16_3", "bf16", 1),
        ("fp16_3", "fp16", 2)],
}  # fmt: skip
"""World size -> (what was saved, precision and stage that DeepSpeed loads it at)."""

UNIVERSAL = {
    1: [("fp32_2", "fp32", 1), ("fp32_3", "fp32", 2), ("bf16_1", "bf16", 3)],
    2: [("fp32_3", "fp32", 1), ("fp32_3", "fp32", 2), ("fp32_3", "fp32", 3), ("bf16_3", "bf16", 1),
        ("fp16_3", "fp16", 3)],
}  # fmt: skip
"""The same of universal checkpoints."""

JOBS = {
    2: ("saved", "imported", "exported", "universal", "converted"),
    1: ("exported", "universal", "stage0"),
    3: ("exported",),
}
"""World size -> jobs of its launch; the launch of 2 ranks saves what the others use."""
