"""The files of a vocabulary: OFA's fairseq layouts, Hugging Face's, ModelScope's, and our own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
META = "ofa_vocab.json"
"""Our own side file: counts of codes and bins, and the fingerprint."""

OFA_CODES, OFA_BINS = 8192, 1000
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
    piece_of = {str(number): piece for piece, number in _read_json(path / "encoder.json").items()}
    pieces = [piece_of.get(symbol, symbol) for symbol in symbols]  # madeupword0000 ... stand for themselves
    listed = set(pieces)
    unlisted = [piece for piece in piece_of.values() if piece not in listed]
    return Files("bpe", pieces, symbols, _merges(path / "vocab.bpe"), OFA_CODES, OFA_BINS, unlisted)


def _read_fairseq_wordpiece(path: Path) -> Files:
    pieces = _dictionary(path / "dict.txt")
    listed = set(pieces)
    unlisted = [piece for piece in _lines(path / "vocab.txt") if piece not in listed]
    if "[UNK]" not in listed:
        raise ValueError(f"{path / 'dict.txt'}: want BERT's [UNK] among the entries")
    return Files("wordpiece", pieces, pieces, (), OFA_CODES, OFA_BINS, unlisted)


def _read_hugging_face(path: Path) -> Files:
    ids = _read_json(path / "vocab.json")
    added = path / "added_tokens.json"
    if added.exists():
        ids |= _read_json(added)
    entries = sorted(ids, key=ids.__getitem__)
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"{path / 'vocab.json'}: want each id of 0 ... {len(ids) - 1} once ({added.name} counts too)")
    pieces, num_codes, num_bins = _split(entries, path / "vocab.json")
    if not num_codes and not num_bins and not (path / META).exists():
        num_codes, num_bins = OFA_CODES, OFA_BINS  # OFA's tokenizer adds them after reading the files
    return Files("bpe", pieces, pieces, _merges(path / "merges.txt"), num_codes, num_bins)


def _read_modelscope_wordpiece(path: Path) -> Files:
    pieces, num_codes, num_bins = _split(_lines(path / "vocab.txt"), path / "vocab.txt")
    if (path / META).exists():
        meta = _read_json(path / META)
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
    return [line.rpartition(" ")[0] for line in lines]


def _merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_lines(path), 1):
        if number == 1 and line.startswith("#version"):
            continue
        left, space, right = line.partition(" ")
        if not (left and space and right) or " " in right:
            raise ValueError(f"{path}:{number}: want two pieces with a space between, got {line!r}")
        merges.append((left, right))
    return merges


def _lines(path: Path) -> list[str]:
    """Lines without their ends. Only "\\n" ends a line: a piece may hold any other separator."""
    try:
        return path.read_bytes().decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: want UTF-8 text: {error}") from error


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: want JSON: {error}") from error
