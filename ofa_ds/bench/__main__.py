"""`python -m ofa_ds.bench WHAT`: measures beside the alternative, in one run; prints a table, or JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

Option = tuple[str, dict[str, Any]]
"""As `add_argument` takes it."""


def at_least_one(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"want at least 1, got {text}")
    return int(text)


def milliseconds(text: str) -> float:
    if not 0 <= (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"want at least 0, got {text}")
    return value


def rate(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"want more than 0, got {text}")
    return value


def count(name: str, default: int, what: str) -> Option:
    return name, {"type": at_least_one, "default": default, "help": f"{what} (default {default:,})"}


def number(name: str, kind: Any, default: float, what: str) -> Option:
    return name, {"type": kind, "default": default, "help": f"{what} (default {default:g})"}


def choice(name: str, values: tuple[str, ...], default: str, what: str) -> Option:
    return name, {"choices": values, "default": default, "help": f"{what} (default {default})"}


def place(name: str, what: str, **more: Any) -> Option:
    return name, {"type": Path, "help": what, **more}


@dataclass(frozen=True)
class Bench:
    help: str
    run: str
    """module.function of this package, which is given the options' values in their order; the module has `table`."""
    options: tuple[Option, ...]
    reads_files: bool = False
    """The user's: what is wrong with them, an OSError or a ValueError, is told in one line."""


BENCHES = {
    "step": Bench(
        "forward + backward of tiny on one thread, beside the original's way", "step.bench_step",
        (count("--repeats", 7, "of the pair"), count("--mixed-repeats", 1, "of the mixed micro-batch")),
    ),
    "checkpoint": Bench(
        "save, reshard and export beside DeepSpeed's and torch's own ways", "checkpoint.bench_checkpoint",
        (("--preset", {"default": "base", "help": "size of the model (default base, cut to 173 M parameters)"}),
         place("--folder", "where 25 GB may be written for a while (default: a temporary one)")),
    ),
    "data": Bench(
        "the same rows written and read by our shards and by other formats", "data_formats.bench_formats",
        (count("--records", 20_000, "drawn, or of the file at most"), count("--repeats", 3, "of each way"),
         place("--tsv", "a file of vision-language rows in place of drawn ones"),
         place("--folder", "where 6 GB may be written for a while (default: a temporary one)")),
        reads_files=True,
    ),
    "rows": Bench(
        "one row of shards at random, beside Arrow's own row access", "rows.bench_rows",
        (place("--shards", "a directory of shards (default: small scenes, drawn for it)"),
         count("--repeats", 7, "of each way")),
        reads_files=True,
    ),
    "verify": Bench(
        "checksums of shards, beside a plain read of the same files", "verify.bench_verify",
        (place("--shards", "a directory of shards, of some gigabytes", required=True),
         count("--repeats", 3, "of each way")),
        reads_files=True,
    ),
    "decode": Bench(
        "JPEGs decoded and resized, exactly and by the DCT, beside Pillow", "decode.bench_decode",
        (place("--tsv", "a file with JPEGs in its second column, beside drawn ones"),
         count("--pictures", 100, "of the file and of each size"), count("--repeats", 5, "of each way")),
        reads_files=True,
    ),
    "codes": Bench(
        "pictures into image codes on one thread, beside the original's way", "codes.bench_codes",
        (count("--repeats", 5, "rounds of both ways"), count("--pictures", 4, "of a round")),
    ),
    "loader": Bench(
        "batches on their way to training, beside torch's DataLoader", "loader.bench_loader",
        (count("--repeats", 3, "of each measurement"),),
    ),
    "remote": Bench(
        "rows of shards in S3 behind a link with latency and a bandwidth", "remote.bench_remote",
        (number("--latency-ms", milliseconds, 30, "that the link adds"),
         number("--mb-per-s", rate, 10, "that it carries at most")),
    ),
    "scale": Bench(
        "opening and reading a billion rows, their order, their shuffle", "scale.bench_scale",
        (count("--shards", 10_000, "of 100,000 rows each"), count("--workers", 4, "that open them at once"),
         count("--repeats", 5, "of each order"),
         place("--folder", "where 2 GB may be written for a while (default: a temporary one)")),
    ),
    "cider": Bench(
        "the reward of SCST for 320 captions, beside the library's scorer", "cider.bench_cider",
        (count("--repeats", 7, "of each way"),),
    ),
    "scst": Bench(
        "the parts of an SCST micro-batch of tiny on one thread", "scst.bench_scst",
        (count("--repeats", 3, "of each part"),),
    ),
    "generate": Bench(
        "captions and candidate answers beside the original's way", "generate.bench_generate",
        (count("--repeats", 3, "of each way"), count("--questions", 2, "that the candidates answer at once"),
         count("--chunks", 4, "of the original's 157 that are timed"),
         choice("--only", ("captions", "candidates", "both"), "both", "of the two")),
    ),
    "text_to_image": Bench(
        "24 pictures of 1,024 codes beside sampling without caches", "text_to_image.bench_text_to_image",
        (count("--repeats", 1, "of ours"),),
    ),
    "construction": Bench(
        "a model built in pieces on the CPU: seconds and memory of a rank", "construction.bench_construction",
        (("--preset", {"default": "large", "help": "its size (default large); 6b takes 14 GB with two ranks"}),
         count("--ranks", 2, "on this host"), choice("--precision", ("bf16", "fp32"), "bf16", "of its weights")),
    ),
    "many-ranks": Bench(
        "what the host does around a collective of a layer", "many_ranks.bench_many_ranks",
        (count("--repeats", 5, "of each way"),),
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ofa_ds.bench", description=__doc__.split(": ")[1])
    parsers = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, bench in BENCHES.items():
        own = parsers.add_parser(name, help=bench.help)
        for flag, how in bench.options:
            own.add_argument(flag, **how)
        own.add_argument("--json", action="store_true")
    options = vars(parser.parse_args())
    bench = BENCHES[options["what"]]
    values = [options[flag[2:].replace("-", "_")] for flag, _ in bench.options]
    module_name, function = bench.run.split(".")
    module = import_module(f"ofa_ds.bench.{module_name}")
    try:
        result = getattr(module, function)(*values)
    except (OSError, ValueError) as error:
        if not bench.reads_files:
            raise
        parser.error(str(error))
    print(json.dumps(result) if options["json"] else module.table(result))


if __name__ == "__main__":
    main()
