"""Operators of OFA on packed tokens. Each has its plain-torch reference beside it, which is also the CPU path."""
