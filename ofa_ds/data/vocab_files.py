"""The files of a vocabulary: OFA's fairseq layouts, Hugging Face's, ModelScope's, and our own."""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from ofa_ds.storage import strict_json

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
META = "ofa_vocab.json"
"""Our own side file: counts of codes and bins, and the fingerprint."""

OFA_CODES, OFA_BINS = 8192, 1000
MAX_SYMBOLS = 1 << 24
"""Codes, or bins, that a side file may claim."""

_BERT_SPECIALS = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
_MAX_WORDPIECE_CHARACTERS = 100


@dataclass(frozen=True)
class Files:
    """What the files of a vocabulary say, in one form. Entry k of `pieces` has id len(SPECIALS) + k."""

    kind: Literal["bpe", "wordpiece"]
    pieces: Sequence[str]
    """Byte-level BPE pieces, or word pieces with "##" inside words."""
    symbols: Sequence[str]
    """The dictionary's name of each piece: GPT-2's number in fairseq's English files, else the piece itself."""
    merges: Sequence[tuple[str, str]]
    num_codes: int
    num_bins: int
    unlisted: Sequence[str] = ()
    """Pieces that the tokenizer makes and the dictionary lacks."""


def read_files(path: Path) -> Files:
    """Find out the layout of directory `path` and read it. Raises ValueError naming the file that is wrong."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; make a vocabulary: ofa-ds vocab train --shards DIR --out {path}")
    found = {file.name for file in path.iterdir()}
    for names, read in _LAYOUTS:
        if found.issuperset(names):
            return read(path)
    raise ValueError(
        f"{path}: no vocabulary in a known layout: want {', or '.join(' + '.join(names) for names, _ in _LAYOUTS)}; "
        f"found {', '.join(sorted(found)) or 'nothing'}"
    )


def tokenizer_of(files: Files) -> Tokenizer:
    """A tokenizer whose ids are the vocabulary's; `unlisted` pieces get ids past the end."""
    ids = {piece: len(SPECIALS) + k for k, piece in enumerate(files.pieces)}
    past = len(SPECIALS) + len(files.pieces) + 1 + files.num_codes + files.num_bins
    ids |= {piece: past + k for k, piece in enumerate(files.unlisted)}
    if files.kind == "bpe":
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(files.merges)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return tokenizer
    model = models.WordPiece(vocab=ids, unk_token="[UNK]", max_input_chars_per_word=_MAX_WORDPIECE_CHARACTERS)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([special for special in _BERT_SPECIALS if special in ids])
    return tokenizer


def write_files(out: Path, files: Files, fingerprint: str) -> None:
    """Write into the existing directory `out`: Hugging Face's OFA layout for BPE, ModelScope's for word pieces."""
    counts = {"num_codes": files.num_codes, "num_bins": files.num_bins}
    entries = [*SPECIALS, *files.pieces, "<mask>"]
    if files.kind == "bpe":
        ids = {entry: k for k, entry in enumerate(entries)}
        added = [f"<code_{k}>" for k in range(files.num_codes)] + [f"<bin_{k}>" for k in range(files.num_bins)]
        _write_json(out / "vocab.json", ids)
        _write_json(out / "added_tokens.json", {symbol: len(ids) + k for k, symbol in enumerate(added)})
        lines = ["#version: 0.2", *(" ".join(merge) for merge in files.merges)]
        (out / "merges.txt").write_bytes("".join(f"{line}\n" for line in lines).encode())
    else:
        (out / "vocab.txt").write_bytes("".join(f"{entry}\n" for entry in entries).encode())
    head = {"format": "ofa-ds vocabulary", "kind": files.kind, "text": len(files.pieces)}
    meta = head | counts | {"fingerprint": fingerprint}
    (out / META).write_text(json.dumps(meta, indent=1) + "\n")


def _write_json(path: Path, content: dict) -> None:
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode())


def _read_fairseq_bpe(path: Path) -> Files:
    symbols = _dictionary(path / "dict.txt")
    piece_of = {str(number): piece for piece, number in _read_ids(path / "encoder.json").items()}
    pieces = [piece_of.get(symbol, symbol) for symbol in symbols]  # madeupword0000 ... stand for themselves
    listed = set(pieces)
    unlisted = [piece for piece in piece_of.values() if piece not in listed]
    merges = _merges(path / "vocab.bpe", listed | set(unlisted), "encoder.json")
    return Files("bpe", pieces, symbols, merges, OFA_CODES, OFA_BINS, unlisted)


def _read_fairseq_wordpiece(path: Path) -> Files:
    pieces = _dictionary(path / "dict.txt")
    listed = set(pieces)
    unlisted = [piece for piece in _entries(path / "vocab.txt") if piece not in listed]
    if "[UNK]" not in listed:
        raise ValueError(f"{path / 'dict.txt'}: want BERT's [UNK] among the entries")
    return Files("wordpiece", pieces, pieces, (), OFA_CODES, OFA_BINS, unlisted)


def _read_hugging_face(path: Path) -> Files:
    ids = _read_ids(path / "vocab.json")
    added = path / "added_tokens.json"
    for entry, number in (_read_ids(added) if added.exists() else {}).items():
        if ids.setdefault(entry, number) != number:
            raise ValueError(f"{added}: {entry!r} has id {number}, in vocab.json it has {ids[entry]}")
    entries = sorted(ids, key=ids.__getitem__)
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"{path / 'vocab.json'}: want each id of 0 ... {len(ids) - 1} once ({added.name} counts too)")
    pieces, num_codes, num_bins = _split(entries, path / "vocab.json")
    if not num_codes and not num_bins and not (path / META).exists():
        num_codes, num_bins = OFA_CODES, OFA_BINS  # OFA's tokenizer adds them after reading the files
    return Files("bpe", pieces, pieces, _merges(path / "merges.txt", set(pieces), "vocab.json"), num_codes, num_bins)


def _read_modelscope_wordpiece(path: Path) -> Files:
    pieces, num_codes, num_bins = _split(_entries(path / "vocab.txt"), path / "vocab.txt")
    if (meta := read_meta(path)) is not None:
        num_codes, num_bins = meta["num_codes"], meta["num_bins"]
    elif not num_codes and not num_bins:
        num_codes, num_bins = OFA_CODES, OFA_BINS
    if "[UNK]" not in pieces:
        raise ValueError(f"{path / 'vocab.txt'}: want BERT's [UNK] among the entries")
    return Files("wordpiece", pieces, pieces, (), num_codes, num_bins)


_LAYOUTS = (
    (("dict.txt", "encoder.json", "vocab.bpe"), _read_fairseq_bpe),
    (("dict.txt", "vocab.txt"), _read_fairseq_wordpiece),
    (("vocab.json", "merges.txt"), _read_hugging_face),
    (("vocab.txt",), _read_modelscope_wordpiece),
)

KNOWN_FILES = tuple(sorted({name for names, _ in _LAYOUTS for name in names} | {"added_tokens.json", META}))
"""All that any layout reads."""


def _split(entries: Sequence[str], path: Path) -> tuple[list[str], int, int]:
    """Entries by id -> (text pieces, number of codes, number of bins). Raises ValueError for any other order."""
    if tuple(entries[: len(SPECIALS)]) != SPECIALS or "<mask>" not in entries:
        first = " ".join(entries[: len(SPECIALS)])
        raise ValueError(f"{path}: want {' '.join(SPECIALS)} as ids 0 ... 3 and a <mask>, got {first} first")
    mask = entries.index("<mask>")
    rest = list(entries[mask + 1 :])
    num_codes = sum(entry.startswith("<code_") for entry in rest)
    num_bins = len(rest) - num_codes
    if rest != [f"<code_{k}>" for k in range(num_codes)] + [f"<bin_{k}>" for k in range(num_bins)]:
        raise ValueError(f"{path}: want only <code_0> ... <bin_0> ... after <mask> (id {mask}), got {rest[0]} ...")
    return list(entries[len(SPECIALS) : mask]), num_codes, num_bins


def _dictionary(path: Path) -> list[str]:
    """Symbols of a fairseq dictionary: "symbol count" lines."""
    lines = _lines(path)
    bad = next((number for number, line in enumerate(lines, 1) if not line.rpartition(" ")[2].isdigit()), None)
    if bad is not None:
        raise ValueError(f"{path}:{bad}: want 'SYMBOL COUNT', got {lines[bad - 1]!r}")
    return _distinct(path, [line.rpartition(" ")[0] for line in lines])


def _entries(path: Path) -> list[str]:
    """Entries of a vocab.txt, one a line."""
    return _distinct(path, _lines(path))


def _distinct(path: Path, entries: list[str]) -> list[str]:
    """The entries, none of them there twice: both would have one id. (OFA's Chinese dictionary has an empty one.)"""
    first: dict[str, int] = {}
    for number, entry in enumerate(entries, 1):
        if first.setdefault(entry, number) != number:
            raise ValueError(f"{path}:{number}: {entry!r} is in line {first[entry]} too; want each entry once")
    return entries


def _merges(path: Path, known: Set[str], where: str) -> list[tuple[str, str]]:
    """known: all pieces, which the file `where` lists."""
    merges = []
    for number, line in enumerate(_lines(path), 1):
        if number == 1 and line.startswith("#version"):
            continue
        left, space, right = line.partition(" ")
        if not (left and space and right) or " " in right:
            raise ValueError(f"{path}:{number}: want two pieces with a space between, got {line!r}")
        lacking = next((piece for piece in (left, right, left + right) if piece not in known), None)
        if lacking is not None:
            raise ValueError(f"{path}:{number}: {lacking!r} is no piece of {where}; the files do not go together")
        merges.append((left, right))
    return merges


def _lines(path: Path) -> list[str]:
    """Lines without their ends. Only "\\n" ends a line: a piece may hold any other separator."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: want UTF-8 text: {error}") from error
    if text.startswith("\ufeff"):
        raise ValueError(f"{path}:1: starts with a byte order mark; save the file as UTF-8 without one")
    lines = text.removesuffix("\n").split("\n")
    carriage = next((number for number, line in enumerate(lines, 1) if line.endswith("\r")), None)
    if carriage is not None:
        raise ValueError(f"{path}:{carriage}: ends in CRLF, want LF alone; convert it: sed -i 's/\\r$//' {path}")
    return lines


def _read_ids(path: Path) -> dict[str, int]:
    """{entry: id}, no entry and no id twice."""
    ids = _read_json(path)
    entry_of: dict[int, str] = {}
    for entry, number in ids.items():
        if type(number) is not int or number < 0:
            raise ValueError(f"{path}: {entry!r}: want a whole number of at least 0 as its id, got {_short(number)}")
        if entry_of.setdefault(number, entry) != entry:
            raise ValueError(f"{path}: id {number} is that of {entry_of[number]!r} and of {entry!r}; want each once")
    return ids


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Our side file of a vocabulary, None where there is none: num_codes, num_bins, fingerprint."""
    path = folder / META
    if not path.exists():
        return None
    meta = _read_json(path)
    for key in ("num_codes", "num_bins"):
        if type(meta.get(key)) is not int or not 0 <= meta[key] <= MAX_SYMBOLS:
            raise ValueError(f"{path}: {key}: want a whole number 0 ... {MAX_SYMBOLS}, got {_short(meta.get(key))}")
    if not isinstance(meta.get("fingerprint"), str):
        raise ValueError(f"{path}: fingerprint: want text, got {_short(meta.get('fingerprint'))}")
    return meta


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = strict_json.loads(path.read_bytes())
    except ValueError as error:  # of JSON, of UTF-8, or a number of thousands of digits
        raise ValueError(f"{path}: want JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: want a JSON object {{...}}, got {_short(content)}")
    return content


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
