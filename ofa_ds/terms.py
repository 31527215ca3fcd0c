"""The words everything else is said in: tasks, families of rows, loss groups, special ids. Plain names, no imports."""

TASKS = (
    "caption", "vqa", "itm", "visual_grounding", "grounded_caption", "detection", "image_infilling", "text_infilling",
)  # fmt: skip
"""The eight pretraining tasks, in the order in which tables and logs show them."""

FAMILIES = ("vision_language", "text", "image", "detection")
"""Kinds of source rows, one Arrow schema each. A family's place seeds its generators: only append."""

GROUPS = ("vision_language", "other")
"""Loss groups: each is divided by its own global token count (docs/ofa.md, Training: loss)."""

BOS_ID, PAD_ID, EOS_ID, UNK_ID = range(4)
"""Vocabulary ids of <s>, <pad>, </s> and <unk>. A target that is PAD_ID has no loss."""

NUM_SPECIAL_IDS = 4
"""Ids below it are special; text begins there."""
