"""Refuses a recipe that would fail on every rank, before anything is started on a cluster.

python -m ofa_ds.cluster.check_recipe RANKS RECIPE [KEY=VALUE ...]     silent where it is right, else exit code 2
"""

from __future__ import annotations

import sys

from ofa_ds.config import load_recipe


def main(arguments: list[str]) -> int:
    """0 where the recipe loads and its batch divides over RANKS, else 2 and one line on stderr."""
    num_ranks, recipe, *overrides = arguments
    try:
        load_recipe(recipe, overrides).batch.accumulation_steps(int(num_ranks))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
