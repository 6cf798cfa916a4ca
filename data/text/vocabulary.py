"""Word-level vocabularies: split lines into words, map words to indices, store the vocabulary as JSON.

A line is split at white space; every line, even a blank one, ends in `<eos>`. Index 0 is `<eos>`; the words follow by
decreasing count, and ties by first occurrence.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from data.paths import write_atomically
from phantom.engine.errors import DataError
from phantom.validate import check_choice

EOS, UNK = "<eos>", "<unk>"
BOM = "\ufeff"
FORMAT = 1
OOV = Literal["error", "unk"]


@dataclass(frozen=True)
class Vocabulary:
    """The words of a training text, most frequent first, with their counts.

    Args:
        words: in the order of their indices; `<eos>` is the first.
        counts: occurrences of every word in the training text; for `<eos>`, the number of lines.
        fingerprint: identifies the training text: the SHA-256 of its file, if it comes from one.
    """

    words: tuple[str, ...]
    counts: tuple[int, ...]
    fingerprint: str

    @classmethod
    def from_lines(cls, lines: Iterable[Sequence[str]], fingerprint: str, *, min_count: int = 1) -> Vocabulary:
        """Count the words of `lines`; words that occur fewer than `min_count` times count as `<unk>`.

        Raises:
            DataError: the lines hold no word.
        """
        counter: Counter[str] = Counter()
        num_lines = 0
        for words in lines:
            counter.update(words)
            num_lines += 1
        if not counter:
            raise DataError("the training text has no words")
        if min_count > 1:
            rare = sum(count for count in counter.values() if count < min_count)
            counter = Counter({word: count for word, count in counter.items() if count >= min_count})
            counter[UNK] += rare
        if EOS in counter:  # an `<eos>` written in the text is the same word
            num_lines += counter.pop(EOS)
        # sorted() is stable and Counter keeps the order of insertion: ties stay in order of first occurrence
        ranked = sorted(counter.items(), key=lambda item: -item[1])
        return cls((EOS, *(word for word, _ in ranked)), (num_lines, *(count for _, count in ranked)), fingerprint)

    def with_unknown(self) -> Vocabulary:
        """Return the vocabulary with `<unk>`, which occurs 0 times and comes last where the training text has none."""
        if UNK in self.index:
            return self
        return Vocabulary((*self.words, UNK), (*self.counts, 0), self.fingerprint)

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def index(self) -> dict[str, int]:
        """The index of every word."""
        return {word: i for i, word in enumerate(self.words)}

    def encode(self, lines: Iterable[Sequence[str]], *, oov: OOV, source: str) -> Iterator[list[int]]:
        """Yield the indices of every line, including its `<eos>`.

        Args:
            oov: `error` refuses a word outside the vocabulary; `unk` reads it as `<unk>`.
            source: name of the text, for error messages.

        Raises:
            DataError: a word is outside the vocabulary under `oov="error"`, or the vocabulary has no `<unk>`.
        """
        check_choice("oov", oov, get_args(OOV))
        if oov == "unk" and UNK not in self.index:
            raise DataError(f"the vocabulary has no {UNK} for the unknown words of {source}: use data.oov=error")
        index, unknown = self.index, self.index.get(UNK, -1)
        for number, words in enumerate(lines, start=1):
            if oov == "unk":
                yield [*(index.get(word, unknown) for word in words), 0]
                continue
            try:
                yield [*(index[word] for word in words), 0]
            except KeyError as error:
                raise DataError(
                    f"{source}, line {number}: the word {error.args[0]!r} is not in the vocabulary of {len(self)} "
                    "words. Is this text from the same corpus as the training text? data.oov=unk reads unknown words "
                    f"as {UNK}"
                ) from None

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON, atomically."""
        content = {"format": FORMAT, "fingerprint": self.fingerprint, "words": self.words, "counts": self.counts}
        write_atomically(path, lambda part: part.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8"))

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> Vocabulary:
        """Read a vocabulary that `save` wrote.

        Raises:
            DataError: the file is damaged, or belongs to a training text with another fingerprint.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = cls(tuple(content["words"]), tuple(content["counts"]), content["fingerprint"])
            valid = content["format"] == FORMAT and len(found.words) == len(found.counts) == len(found.index)
            valid = valid and found.words[0] == EOS and all(isinstance(count, int) for count in found.counts)
        except (ValueError, KeyError, TypeError, IndexError):
            valid = False
        if not valid:
            raise DataError(f"{path} is damaged, or not a vocabulary of this program: delete it to build it again")
        if found.fingerprint != fingerprint:
            raise DataError(
                f"{path} is the vocabulary of another corpus (fingerprint {found.fingerprint[:12]}, the training text "
                f"has {fingerprint[:12]}): delete it, or choose another folder with data.cache=<folder>"
            )
        return found


def read_words(path: Path) -> Iterator[list[str]]:
    """Yield the words of every line of a UTF-8 text file; a byte order mark at its beginning is no part of a word.

    Files that were joined have such a mark at the beginning of a line, too. Inside a line the same character is a part
    of the text, as in the official code, whose counts of words are those published.

    Raises:
        DataError: the file cannot be read, or is not UTF-8; the message gives the line.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield line.removeprefix(BOM).split()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {_first_bad_line(path)}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _first_bad_line(path: Path) -> str:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number} has the byte 0x{line[error.start]:02x} at position {error.start + 1}"
    return "its last character is cut off"
