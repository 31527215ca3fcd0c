"""Benchmarks beside the alternatives, in one run: `python -m ofa_ds.bench`."""
