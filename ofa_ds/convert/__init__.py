"""OFA's own checkpoint formats, in and out: Hugging Face, ModelScope, fairseq; and DeepSpeed's."""
