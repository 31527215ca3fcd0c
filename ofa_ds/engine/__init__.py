"""The DeepSpeed engine, the state inside it, and which process of how many this is."""
