"""WikiText-103: the word-level `wiki.*.tokens` files, local or from Hugging Face, as memory-mapped indices."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.paths import cache_folder, data_root, root_hint
from data.text.streams import Corpus, TokenStreams
from data.text.vocabulary import OOV, Vocabulary, read_words, write_whole
from phantom.engine.errors import DataError

# published: words with <eos>, and tokens with <eos> per split
WORDS = 267_735
TOKENS = {"train": 103_227_021, "valid": 217_646, "test": 245_569}
HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
log = logging.getLogger(__name__)


class WikiText103(TokenStreams):
    """WikiText-103 (word level, the release that has `<unk>` and `@-@`), or another text in the same line format.

    The vocabulary is that of the training text: `<eos>`, then every word by decreasing count. Vocabulary and indices
    are prepared once, in a folder named after the fingerprint of the training text; indices are memory-mapped.

    Args:
        root: the folder with the token files. None looks under $PHANTOM_DATA/wikitext103, then in the cache folder.
        download: fetch missing files into `root` through Hugging Face `datasets` (Salesforce/wikitext,
            wikitext-103-v1, the same lines).
        files: file name of every split; None leaves a split out.
        oov: a word of valid or test outside the vocabulary is an error, or becomes `<unk>`.
        allow_partial: accept other texts than the full WikiText-103, whose four published counts are checked otherwise.
        cache: where prepared files go; None is the program's cache folder.
        streams, eval_streams, segment: see `TokenStreams`. The official code has 56, 16 and 150.

    Raises:
        DataError: a file is missing, empty or not UTF-8, a word is unknown, a count is wrong, or a prepared file is
            damaged or of another corpus.

    Source: Merity et al., *Pointer Sentinel Mixture Models* (2017).
    """

    def __init__(
        self,
        *,
        root: str | None,
        download: bool,
        files: Mapping[str, str | None],
        oov: OOV,
        allow_partial: bool,
        cache: str | None,
        streams: int,
        eval_streams: int,
        segment: int,
    ) -> None:
        self._root = data_root(root, "wikitext103")
        self._files = {split: name for split, name in files.items() if name is not None}
        unknown = [split for split in self._files if split not in TOKENS]
        if unknown or "train" not in self._files:
            raise ValueError(f"files={dict(files)} must name a file for train, and may for valid and test, only")
        self._download, self._allow_partial = download, allow_partial
        self._oov: OOV = oov
        self._cache = (cache_folder() if cache is None else Path(cache).expanduser()) / "tokens"
        super().__init__(streams=streams, eval_streams=eval_streams, segment=segment)

    def load(self) -> Corpus:
        paths = {split: self._root / name for split, name in self._files.items()}
        if self._download:
            download(paths)
        missing = [path.name for path in paths.values() if not path.is_file()]
        if missing:
            raise DataError(
                f"no WikiText-103 in {self._root}: {', '.join(missing)} missing. {root_hint('wikitext103')}; or let it "
                "be fetched with data.download=true"
            )
        fingerprints = {split: fingerprint_of(path) for split, path in paths.items()}
        folder = self._cache / fingerprints["train"][:16]
        vocabulary = self._vocabulary(paths["train"], fingerprints["train"], folder / "vocabulary.json")
        tokens = {
            split: indices(path, vocabulary, self._oov, folder / f"{fingerprints[split][:16]}-{self._oov}.npy")
            for split, path in paths.items()
        }
        if not self._allow_partial:
            self._check_counts(len(vocabulary), {split: len(array) for split, array in tokens.items()})
        return Corpus(tokens, vocabulary.counts)

    def _vocabulary(self, train: Path, fingerprint: str, path: Path) -> Vocabulary:
        if path.is_file():
            return Vocabulary.load(path, fingerprint)
        log.info("counting the words of %s", train)
        try:
            vocabulary = Vocabulary.of(read_words(train), fingerprint)
        except DataError as error:
            raise DataError(f"{train}: {error}") from error
        vocabulary.save(path)
        return vocabulary

    def _check_counts(self, words: int, tokens: Mapping[str, int]) -> None:
        wrong = [f"{words} words instead of {WORDS}"] if words != WORDS else []
        wrong += [
            f"{split} has {n} tokens instead of {TOKENS[split]}" for split, n in tokens.items() if n != TOKENS[split]
        ]
        if wrong:
            raise DataError(
                f"{self._root} does not hold the full WikiText-103: {'; '.join(wrong)} (<eos> included). "
                "data.allow_partial=true accepts other texts"
            )


def fingerprint_of(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        DataError: the file is empty.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: copy or download it again")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def indices(text: Path, vocabulary: Vocabulary, oov: OOV, path: Path) -> np.ndarray:
    """Return the (N,) int32 indices of a text file, memory-mapped from `path`, which is made if it is missing.

    Raises:
        DataError: the text cannot be read, has unknown words under `oov="error"`, or `path` is damaged.
    """
    if not path.is_file():
        log.info("encoding %s", text)
        count = sum(len(words) + 1 for words in read_words(text))

        def fill(part: Path) -> None:
            array = np.lib.format.open_memmap(part, mode="w+", dtype=np.int32, shape=(count,))
            position = 0
            for line in vocabulary.encode(read_words(text), oov=oov, source=str(text)):
                array[position : position + len(line)] = line
                position += len(line)
            array.flush()

        write_whole(path, fill)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}): delete it, it will be made anew") from error
    if array.ndim != 1 or array.dtype != np.int32 or len(array) == 0:
        raise DataError(f"{path} does not hold the indices of a text: delete it, it will be made anew")
    return array


def download(paths: Mapping[str, Path]) -> None:
    """Fetch the missing ones of `paths` (split -> file) from Hugging Face.

    Raises:
        DataError: it cannot be fetched.
    """
    missing = {split: path for split, path in paths.items() if not path.is_file()}
    if not missing:
        return
    from datasets import load_dataset

    for split, path in missing.items():
        try:
            lines: Any = load_dataset("Salesforce/wikitext", "wikitext-103-v1", split=HUB_SPLITS[split])
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"wikitext-103-v1 could not be fetched from Hugging Face ({str(error).splitlines()[0]}): put the "
                f"wiki.*.tokens files into {path.parent}, or try again"
            ) from error

        def fill(part: Path, lines: Any = lines) -> None:
            with open(part, "w", encoding="utf-8") as file:
                for row in lines:
                    file.write(row["text"].rstrip("\n") + "\n")

        write_whole(path, fill)
