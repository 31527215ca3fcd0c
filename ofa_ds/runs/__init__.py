"""Runs side by side, from what they left in their directories; nothing of a run is changed or needs to be whole."""
