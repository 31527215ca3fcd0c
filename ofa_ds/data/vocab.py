"""Text, image codes and coordinate bins as one vocabulary, whatever the files it comes from.

Ids (docs/ofa.md, Vocabulary): 0 <s>, 1 <pad>, 2 </s>, 3 <unk> | text | <mask> | <code_0> ... | <bin_0> ...
The leading-space convention is GPT-2's: " house" and "house" are different tokens; a space begins a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ofa_ds.data.vocab_files import META, SPECIALS, Files, read_files, read_meta, tokenizer_of, write_files
from ofa_ds.storage.atomic import new_directory, sync_tree
from ofa_ds.terms import BOS_ID, EOS_ID, PAD_ID, UNK_ID

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + k): byte for k, byte in enumerate(_OTHERS)}
"""Byte that each character of a byte-level piece stands for: GPT-2's table."""
_CLOSE_UP = [(f" {mark}", mark) for mark in ".?!,"] + [(" ' ", "'")]
"""What word pieces lose of the original text: no space before these marks, none around an apostrophe."""
_SPACE = chr(256 + _OTHERS.index(32))

CHARACTERS_A_TOKEN = 8
"""More than the average of any text that a vocabulary was made for."""


class Vocab:
    """Encodes text to ids and back. Picklable; never changes after it is made."""

    bos, pad, eos, unk = BOS_ID, PAD_ID, EOS_ID, UNK_ID

    def __init__(self, files: Files) -> None:
        self._files = files
        self.kind = files.kind
        self.num_codes, self.num_bins = files.num_codes, files.num_bins
        self.mask = len(SPECIALS) + len(files.pieces)
        self.code_start = self.mask + 1
        self.bin_start = self.code_start + self.num_codes
        self.size = self.bin_start + self.num_bins
        self._tokenizer = tokenizer_of(files)

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Ids of `text` as given, a leading space included; no bos, no eos. No symbol in it is special.

        limit: only so many of them, from the start. Of a long text no more is then encoded than they need; the ids are
        the same, but where a single word, or gap, is longer than `limit` of the longest pieces.
        """
        if limit is None:
            return self._encode(text)
        end = CHARACTERS_A_TOKEN * limit
        while end < len(text):
            place = _word_end(text, end)
            ids = self._encode(text[:place]) if place else []
            if len(ids) >= limit:
                return ids[:limit]
            if end >= 2 * limit * self._longest_piece:  # as many tokens even before the word that this cuts
                return self._encode(text[:end])[:limit]
            end *= 2
        return self._encode(text)[:limit]

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        # A piece that the tokenizer knows and the dictionary does not has an id past the end of the vocabulary.
        return [token if token < self.size else UNK_ID for token in ids]

    def encode_words(self, text: str) -> list[int]:
        """Ids of the dictionary's own symbols, split at white space, such as "<bin_3> <code_7>"; else <unk>."""
        return [self._id_of_symbol.get(word, UNK_ID) for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text. bos, pad and eos are left out; codes, bins, <mask> and <unk> stand as their symbols."""
        out, run = "", []
        for token in (*ids, EOS_ID):
            if len(SPECIALS) <= token < self.mask:
                run.append(self._files.pieces[token - len(SPECIALS)])
                continue
            out += self._join(run, out)
            run = []
            if token not in (BOS_ID, PAD_ID, EOS_ID):
                out += (" " if out and not out.endswith(" ") else "") + self.symbol(token)
        return out

    def _join(self, pieces: list[str], before: str) -> str:
        if self.kind == "wordpiece":
            text = " ".join(pieces).replace(" ##", "")
            for before_mark, mark in _CLOSE_UP:
                text = text.replace(before_mark, mark)
            return f" {text}" if before and text else text
        return bytes(_BYTE_OF[character] for piece in pieces for character in piece).decode("utf-8", "replace")

    def symbol(self, token: int) -> str:
        """The dictionary's name of an id. Raises ValueError for an id outside the vocabulary."""
        if not 0 <= token < self.size:
            raise ValueError(f"id {token} is outside the vocabulary, which has {self.size} entries")
        if token < len(SPECIALS):
            return SPECIALS[token]
        if token < self.mask:
            return self._files.symbols[token - len(SPECIALS)]
        if token == self.mask:
            return "<mask>"
        return f"<code_{token - self.code_start}>" if self.is_code(token) else f"<bin_{token - self.bin_start}>"

    def code(self, k: int) -> int:
        """Id of image code k."""
        if not 0 <= k < self.num_codes:
            raise ValueError(f"image code {k} is outside 0 ... {self.num_codes - 1}")
        return self.code_start + k

    def bin(self, k: int) -> int:
        """Id of coordinate bin k."""
        if not self.num_bins:
            raise ValueError("the vocabulary has no coordinate bins; make one that has: ofa-ds vocab train --bins 1000")
        if not 0 <= k < self.num_bins:
            raise ValueError(f"coordinate bin {k} is outside 0 ... {self.num_bins - 1}")
        return self.bin_start + k

    def is_code(self, token: int) -> bool:
        return self.code_start <= token < self.bin_start

    def is_bin(self, token: int) -> bool:
        return self.bin_start <= token < self.size

    def starts_word(self, token: int) -> bool:
        """Whether a word begins at this token (docs/ofa.md, Tasks: noising). True for all but text."""
        return bool(self.word_starts[token])

    @cached_property
    def word_starts(self) -> np.ndarray:
        """bool [size]: `starts_word` of every id."""
        pieces = self._files.pieces
        if self.kind == "wordpiece":
            text = [not piece.startswith("##") for piece in pieces]
        else:
            text = [piece.startswith((_SPACE, "madeupword")) for piece in pieces]
        starts = np.ones(self.size, bool)
        starts[len(SPECIALS) : self.mask] = text
        return starts

    @property
    def files(self) -> Files:
        """What its files say, for writing them again."""
        return self._files

    @cached_property
    def fingerprint(self) -> str:
        """Of what the ids mean, not of the files: equal for OFA's files and the same vocabulary imported."""
        files = self._files
        content = [files.kind, files.pieces, files.merges, self.num_codes, self.num_bins]
        return xxhash.xxh3_128_hexdigest(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass"))

    @cached_property
    def _longest_piece(self) -> int:
        """Characters that one token stands for at most, an unknown word aside."""
        return max(map(len, self._files.pieces), default=1)

    @cached_property
    def _id_of_symbol(self) -> dict[str, int]:
        return {self.symbol(token): token for token in range(self.size)}

    def save(self, out: Path) -> None:
        """Write a directory that `load_vocab` reads: Hugging Face's OFA layout for BPE, ModelScope's for word pieces.

        Raises ValueError where `out` exists and is not empty.
        """
        out = Path(out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} exists and is not an empty directory; give another --out or remove it")
        with new_directory(out) as partial:
            write_files(partial, self._files, self.fingerprint)
            sync_tree(partial)


def _word_end(text: str, end: int) -> int:
    """The last place up to `end` where a word ends in any tokenizer: before a space between others; 0 for none."""
    place = text.rfind(" ", 1, end)
    while place > 0 and (text[place - 1].isspace() or text[place + 1].isspace()):
        place = text.rfind(" ", 1, place)
    return max(place, 0)


def load_vocab(path: Path | str) -> Vocab:
    """Read a vocabulary directory, finding out its layout.

    Known: OFA's fairseq English (dict.txt, encoder.json, vocab.bpe) and Chinese (dict.txt, vocab.txt) files; a Hugging
    Face OFA repository (vocab.json, merges.txt); ModelScope's Chinese (vocab.txt); what `train_vocab` and
    `import_vocab` write. Raises ValueError for any other, naming what was found.
    """
    path = Path(path)
    vocab = Vocab(read_files(path))
    meta = read_meta(path)
    if meta is not None and meta["fingerprint"] != vocab.fingerprint:
        raise ValueError(f"{path}: the files are not those that {META} describes; train or import the vocabulary again")
    return vocab


def import_vocab(source: Path | str, out: Path | str) -> Vocab:
    """Bring a vocabulary of any known layout into one directory of ours, with the same ids and fingerprint."""
    vocab = load_vocab(source)
    vocab.save(Path(out))
    return load_vocab(out)


def train_vocab(texts: Iterable[str], size: int, out: Path | str, num_codes: int = 8192, num_bins: int = 1000) -> Vocab:
    """Train a byte-level BPE and write it to `out`. The same texts give the same files.

    size: entries of the text part: the 256 bytes (so that nothing is ever <unk>) and size - 256 merges. Fewer come out
    where the texts have no pair left that occurs twice. The whole vocabulary has 4 + text + 1 + num_codes + num_bins.
    """
    if size < 256:
        raise ValueError(f"vocabulary size {size} is less than the 256 bytes that every text is made of")
    if num_codes < 0 or num_bins < 0:
        raise ValueError(f"want counts of codes and bins of at least 0, got {num_codes} and {num_bins}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    id_of_piece = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]  # a str before 0.20
    pieces = sorted(id_of_piece, key=id_of_piece.__getitem__)
    Vocab(Files("bpe", pieces, pieces, merges, num_codes, num_bins)).save(Path(out))
    return load_vocab(out)
