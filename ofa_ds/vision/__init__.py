"""Pictures as discrete codes: the VQGAN that OFA's image codes come from (docs/ofa.md)."""
