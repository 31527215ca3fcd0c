"""The words everything else is said in: tasks, families of rows, loss groups, special ids. Plain names, no imports."""

GROUP_OF = {
    "caption": "vision_language", "vqa": "vision_language", "itm": "vision_language",
    "visual_grounding": "vision_language", "grounded_caption": "vision_language", "detection": "other",
    "image_infilling": "other", "text_infilling": "other",
    "caption_scst": "other", "refcoco": "other", "refcocoplus": "other", "refcocog": "other", "snli_ve": "other",
    "cola": "other", "mnli": "other", "mrpc": "other", "qnli": "other", "qqp": "other", "rte": "other",
    "sst2": "other", "imagenet": "other", "gigaword": "other", "text_to_image": "other",
}  # fmt: skip
"""The tasks, in the order in which tables and logs show them, and the loss group of each."""

TASKS = tuple(GROUP_OF)
"""Their names. What each is stands in `ofa_ds.tasks.task`."""

PRETRAINING_TASKS = TASKS[:8]
"""Those that a pretraining step mixes."""

DOWNSTREAM_TASKS = ("caption", "vqa", *TASKS[len(PRETRAINING_TASKS) :])
"""Those that a model is fine-tuned on, one at a time. Captions and questions have rows of their own there."""

PRETRAINING_FAMILIES = ("vision_language", "text", "image", "detection")
"""Kinds of source rows that pretraining mixes, one Arrow schema each."""

FAMILIES = (*PRETRAINING_FAMILIES, "downstream")
"""All kinds of rows. A family's place seeds its generators: only append."""

GROUPS = ("vision_language", "other")
"""Loss groups: each is divided by its own global token count (docs/ofa.md, Training: loss)."""

CHECKPOINT = r"step_(\d{8,})"
"""Name of a checkpoint's directory in a run directory, as a pattern: its step, in eight digits or more."""

STOPPED = 130
"""Exit code of a rank, and of a launch, that has saved and stopped as asked."""

BOS_ID, PAD_ID, EOS_ID, UNK_ID = range(4)
"""Vocabulary ids of <s>, <pad>, </s> and <unk>. A target that is PAD_ID has no loss."""

NUM_SPECIAL_IDS = 4
"""Ids below it are special; text begins there."""

FORMATS = ("deepspeed", "universal", "huggingface", "fairseq", "modelscope")
"""Other programs' checkpoints, in and out. What each is stands in `ofa_ds.convert.formats`."""

SHARD_BYTES, ROWS_PER_SHARD = 512 << 20, 1_000_000
"""Of one Arrow file of shards where nobody says otherwise: bytes, about; rows, at most."""

IMPORTED = {
    "caption": "vision_language", "qa": "vision_language", "visual_grounding": "vision_language",
    "detection": "detection", "text": "text",
}  # fmt: skip
"""What rows of foreign data sets may be -> their family."""

ANNOTATIONS = {"coco-captions": "caption", "coco-instances": "detection", "vqa-v2": "qa", "refcoco": "visual_grounding"}
"""Foreign annotation files beside a folder of pictures -> what their rows are, one of IMPORTED."""

IMPORT_FORMATS = ("folder", "webdataset", "parquet", "huggingface", *ANNOTATIONS)
"""What becomes shards beside OFA's own files. What each is stands in `ofa_ds.data.importing`."""

CLIP_SCORE, FID, INCEPTION_SCORE = "CLIP score", "FID", "Inception score"
PICTURE_SCORES = (CLIP_SCORE, FID, INCEPTION_SCORE)
"""Of painted pictures, with weights that the user names; none of them is a share."""

BEST_OF = ", best of "
"""Between the name of a score and the number of samples whose best one it is of."""
