"""ofa-ds: pretraining of OFA, one model for images, text, boxes and image codes, with DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
