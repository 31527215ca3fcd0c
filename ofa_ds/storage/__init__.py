"""Files of tensors and how they get on a disk. Knows no torch: what only copies or checks them starts at once."""
