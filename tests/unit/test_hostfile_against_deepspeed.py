"""Hostfiles and filters are read as DeepSpeed reads them, but for the differences named here, each of them deliberate.

Random files and filters go to both readers. Where a file has nothing of what DIFFERENCES name, both must say the same.
"""

from __future__ import annotations

import collections
import io
import logging
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ofa_ds.cluster.hostfile import Host, choose, read_text

deepspeed = pytest.importorskip("deepspeed.launcher.runner")

SEED = 12
FILES, FILTERS = 10_000, 10_000
Pool = dict[str, list[int]]

WORDS = ["a", "b", "gpu-2", "10.0.0.1", "u@a", "v@b", "fe80::1", "n.x_y"]
ODD_NAMES = ["a,b", "[1-4]", "-oX", "é", "a#b", "u@", "@a", "a@b@c", "\ufeffa"]
GAPS = [" ", "  ", "\t", " \t "]
ODD_GAPS = ["\v", "\f", "\xa0", "\u2003", ""]
SLOTS = ["slots=1", "slots=4", "slots=08", "slots=8"]
ODD_SLOTS = ["slots=0", "slots=8x", "slots=-1", "slots =2", "slot=2", "slots=2 slots=3", "slots=\uff14",
             "slots=7777777", "slots=4 max_slots=8", "SLOTS=3", ""]  # fmt: skip
TAILS = ["", "", "", " ", "\t", " # half", "#c", "# slots=2", "\r"]
ODD_TAILS = [" # spare", "#spare ", "\x1c", "\u2028", "\v", " x", "\rb slots=2"]
COMMENTS = ["", "  ", "# a slots=4", "\t# b", "#", "#\x85 c", "# \u2028a slots=1"]
ODD_LINES = ["\v# a", "# c\ra slots=1", "\xa0"]

OUR_NAME = r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.:-]*"
"""What may name a host."""


def lines_of(text: str) -> list[str]:
    return text.split("\n")


def before_comment(line: str) -> str:
    return line.partition("#")[0].strip()


def names_of(text: str) -> list[str]:
    return [before_comment(line).split()[0] for line in lines_of(text) if before_comment(line)]


DIFFERENCES: dict[str, Callable[[str], bool]] = {
    # DeepSpeed reads `8x` and `8 max_slots=9` as 8, and lets go of the rest
    "text after the number of slots": lambda text: any(
        re.match(r"\S+\s+slots=\d+[^\d\s#]|\S+\s+slots=\d+\s+[^\s#]", line.strip()) for line in lines_of(text)
    ),
    # commas, brackets, options and quotes mean something to ssh, pdsh, mpirun or a shell
    "a name that is no host's": lambda text: any(
        not re.fullmatch(OUR_NAME, words[0]) for words in map(str.split, lines_of(text)) if words and words[0][0] != "#"
    ),
    "zero slots": lambda text: re.search(r"slots=0+(?!\d)", text) is not None,
    "more than 999,999 slots": lambda text: re.search(r"slots=\d{7}", text) is not None,
    "digits that are not 0-9": lambda text: re.search(r"slots=\d*[^\D0-9]", text) is not None,
    "one machine under two users": lambda text: any(
        count > 1 for count in collections.Counter(name.rpartition("@")[2] for name in set(names_of(text))).values()
    ),
    # other spaces and line ends look like nothing, and make two lines of one or one of two
    "spaces other than blank and tab": lambda text: re.search(r"[^\S \t\r\n]", text) is not None,
    "a carriage return within a line": lambda text: re.search(r"\r(?!\n|\Z)", text) is not None,
    "a spare": lambda text: re.search(r"#[ \t]*spare[ \t\r]*$", text, re.MULTILINE) is not None,
}  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def theirs(text: str) -> dict[str, int] | None:
    """None where refused. Lines end as they do in a text file that Python opens."""
    try:
        return dict(deepspeed._parse_hostfile(io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8").readlines()))
    except ValueError:
        return None


def ours(text: str) -> dict[str, int] | None:
    try:
        return {host.name: host.slots for host in read_text(text.encode(), "hosts")}
    except ValueError as error:
        assert re.match(r"hosts(:\d+)?: ", str(error)) and len(str(error).splitlines()) == 1, str(error)
        return None


def random_file(draw: random.Random) -> str:
    """A few lines, of which each piece is odd now and then."""

    def pick(usual: list[str], odd: list[str]) -> str:
        return draw.choice(odd if draw.random() < 0.03 else usual)

    lines = []
    for _ in range(draw.choice([0, 1, 1, 2, 2, 3, 4])):
        if draw.random() < 0.25:
            lines.append(pick(COMMENTS, ODD_LINES))
        else:
            pieces = ((WORDS, ODD_NAMES), (GAPS, ODD_GAPS), (SLOTS, ODD_SLOTS), (TAILS, ODD_TAILS))
            lines.append(draw.choice(["", "", " "]) + "".join(pick(*piece) for piece in pieces))
    return "\n".join(lines) + draw.choice(["", "\n", "\r\n"])


def test_files_are_read_alike_but_for_the_differences_listed() -> None:
    draw = random.Random(SEED)
    seen: collections.Counter[str] = collections.Counter()
    with quiet():
        for case in range(FILES):
            text = random_file(draw)
            here, there = ours(text), theirs(text)
            reasons = [name for name, holds in DIFFERENCES.items() if holds(text)]
            if reasons == ["a spare"] and here:  # DeepSpeed starts ranks there; what is read is the same
                assert here == there and any(host.spare for host in read_text(text.encode(), "hosts"))
                seen["a spare"] += 1
            elif here != there:
                assert reasons, f"seed {SEED}, case {case}: {text!r}: DeepSpeed says {there}, we say {here}"
                seen.update(reasons if len(reasons) == 1 else [])
            elif not reasons:
                seen["refused by both" if here is None else "read alike"] += 1
    print(f"seed {SEED}: {dict(seen)}")
    assert set(DIFFERENCES) <= seen.keys(), "a difference that is none: take it from the list"
    assert seen["read alike"] > FILES / 4 and seen["refused by both"] > FILES / 100


# Filters


FILTER_DIFFERENCES: dict[str, Callable[[str, list[Host]], bool]] = {
    # `@` separates hosts for DeepSpeed, so that it finds none of a hostfile with users
    "a host with a user": lambda text, hosts: any("@" in host.name for host in hosts),
    # DeepSpeed takes its last part for GPUs, or fails
    "an address with colons": lambda text, hosts: any(":" in host.name for host in hosts) or text.count("::") > 0,
    # DeepSpeed starts nothing, with an IndexError later
    "nothing left": lambda text, hosts: True,
    # Python's int() takes signs, blanks and underscores
    "numbers of other forms": lambda text, hosts: re.search(r":[^@]*[^0-9,@:]", text) is not None,
}


def their_choice(hosts: list[Host], include: str, exclude: str) -> Pool | None:
    try:
        pool = {host.name: host.slots for host in hosts}
        return {name: list(numbers) for name, numbers in
                deepspeed.parse_inclusion_exclusion(pool, include, exclude).items()}  # fmt: skip
    except ValueError:
        return None


def our_choice(hosts: list[Host], include: str, exclude: str) -> Pool | None:
    try:
        return {host.name: list(host.device_numbers) for host in choose(hosts, include, exclude)}
    except ValueError as error:
        assert re.match(r"--(include|exclude) ", str(error)) and len(str(error).splitlines()) == 1, str(error)
        return None


def random_filter(draw: random.Random, hosts: list[Host]) -> str:
    parts = []
    for _ in range(draw.choice([1, 1, 2, 3])):
        names = [host.name for host in hosts] if draw.random() < 0.95 else ["nobody", "", "a:b"]
        name = draw.choice(names)
        if draw.random() < 0.5:
            numbers = [str(draw.randrange(4)) for _ in range(draw.choice([1, 1, 2, 3]))]
            if draw.random() < 0.05:
                numbers[0] = draw.choice(["+1", " 0", "0_1", "x", "-1", "", "9", "1:2", "\uff11", "00"])
            name += ":" + ",".join(numbers)
        parts.append(name)
    return "@".join(parts) + ("@" if draw.random() < 0.02 else "")


def random_case(draw: random.Random) -> tuple[list[Host], str, str]:
    names = draw.sample(["a", "b", "gpu-2", "10.0.0.1", "c.d"], k=draw.randrange(1, 5))
    if draw.random() < 0.05:
        names[0] = draw.choice(["u@x", "fe80::1"])
    hosts = [Host(name, draw.choice([1, 2, 4, 4, 8])) for name in names]
    kind = draw.random()
    include = random_filter(draw, hosts) if kind < 0.5 else ""
    exclude = random_filter(draw, hosts) if kind >= 0.5 or kind < 0.02 else ""
    return hosts, include, exclude


def test_filters_leave_the_same_hosts_and_gpus_but_for_the_differences_listed() -> None:
    draw = random.Random(SEED)
    seen: collections.Counter[str] = collections.Counter()
    with quiet():
        for case in range(FILTERS):
            hosts, include, exclude = random_case(draw)
            here, there = our_choice(hosts, include, exclude), their_choice(hosts, include, exclude)
            if here == there:
                seen["refused by both" if here is None else "alike"] += 1
                continue
            if there == {} and here is None:
                seen["nothing left"] += 1
                continue
            reasons = [name for name, holds in FILTER_DIFFERENCES.items()
                       if name != "nothing left" and holds(include + exclude, hosts)]  # fmt: skip
            what = f"{hosts}, --include {include!r}, --exclude {exclude!r}"
            assert reasons, f"seed {SEED}, case {case}: {what}: DeepSpeed says {there}, we say {here}"
            seen.update(reasons if len(reasons) == 1 else [])
    print(f"seed {SEED}: {dict(seen)}")
    assert set(FILTER_DIFFERENCES) <= seen.keys(), "a difference that is none: take it from the list"
    assert seen["alike"] > FILTERS / 4 and seen["refused by both"] > FILTERS / 50
