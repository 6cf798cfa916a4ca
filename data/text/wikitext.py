"""WikiText-103: the word-level `wiki.*.tokens` files, local or from Hugging Face, as memory-mapped indices."""

from __future__ import annotations

import codecs
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.arrays import load_array, save_array
from data.digests import LENGTH
from data.paths import cache_folder, data_root, root_hint, write_atomically
from data.text.streams import Corpus, TokenStreams
from data.text.vocabulary import OOV, Vocabulary, read_words
from phantom.engine.errors import DataError, first_line
from phantom.validate import check_count

# published counts of words and of tokens per split, <eos> included
WORDS = 267_735
TOKENS = {"train": 103_227_021, "valid": 217_646, "test": 245_569}
HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
log = logging.getLogger(__name__)


class WikiText103(TokenStreams):
    """WikiText-103 (word level, the release with `<unk>` and `@-@`), or another text in the same line format.

    The vocabulary is `<eos>`, then every word of the training text by decreasing count. The loader caches vocabulary
    and indices in a folder named after the fingerprint of the training text, and memory-maps the indices.

    Args:
        root: folder with the token files. None means $PHANTOM_DATA/wikitext103, or the cache folder without that
            variable.
        download: download missing files into `root` with Hugging Face `datasets` (Salesforce/wikitext,
            wikitext-103-v1: the same lines).
        files: file name of every split; None leaves a split out.
        oov: `error` refuses a word of valid or test outside the vocabulary; `unk` reads it as `<unk>`, which becomes
            the last word of a vocabulary without it.
        allow_partial: accept other texts; otherwise the loader checks the four published counts of WikiText-103.
        eval_tokens: evaluate on so many first tokens of every split alone, as a rehearsal; None is all of them.
        cache: folder of the cached files; None means the program's cache folder.
        streams, eval_streams, segment: see `TokenStreams`. The official code uses 56, 16 and 150.

    Raises:
        DataError: a file is missing, empty or not UTF-8, a word is unknown, a count is wrong, or the cached vocabulary
            is damaged or of another corpus.

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
        eval_tokens: int | None,
        cache: str | None,
        streams: int,
        eval_streams: int,
        segment: int,
    ) -> None:
        self._root = data_root(root, "wikitext103")
        named = files.items() if isinstance(files, Mapping) else ()
        self._files = {split: name for split, name in named if name is not None}
        known = all(split in TOKENS and isinstance(name, str) for split, name in self._files.items())
        if not known or "train" not in self._files:
            raise ValueError(
                f"files={files!r} must name a file for train; valid and test are optional, no other is known, and each "
                "is one file, as in {train: wiki.train.tokens, valid: null, test: null}"
            )
        check_count("eval_tokens", eval_tokens, least=2, also=", or null for all", optional=True)
        self._download, self._allow_partial, self._eval_tokens = download, allow_partial, eval_tokens
        self._oov: OOV = oov
        self._cache = (cache_folder() if cache is None else Path(cache).expanduser()) / "tokens"
        super().__init__(streams=streams, eval_streams=eval_streams, segment=segment)

    def load(self) -> Corpus:
        paths = {split: self._root / name for split, name in self._files.items()}
        for path in paths.values():
            if path.is_dir():
                raise DataError(f"{path} is a folder, and a split is one file: join its files, one after the other")
        if self._download:
            download(paths)
        missing = [path.name for path in paths.values() if not path.is_file()]
        if missing:
            raise DataError(
                f"no WikiText-103 in {self._root}: {', '.join(missing)} missing. {root_hint('wikitext103')}, or "
                "download it with data.download=true"
            )
        fingerprints = {split: fingerprint_of(path) for split, path in paths.items()}
        folder = self._cache / fingerprints["train"][:16]
        vocabulary = self._vocabulary(paths["train"], fingerprints["train"], folder / "vocabulary.json")
        tokens = {
            split: load_indices(path, vocabulary, self._oov, folder / f"{fingerprints[split][:16]}-{self._oov}.npy")
            for split, path in paths.items()
        }
        if not self._allow_partial:
            self._check_counts(len(vocabulary), {split: len(array) for split, array in tokens.items()})
        tokens = {split: array if split == "train" else array[: self._eval_tokens] for split, array in tokens.items()}
        return Corpus(tokens, vocabulary.counts, {split: found[:LENGTH] for split, found in fingerprints.items()})

    def _vocabulary(self, train: Path, fingerprint: str, path: Path) -> Vocabulary:
        if path.is_file():
            return self._with_unknown(Vocabulary.load(path, fingerprint))
        log.info("counting the words of %s", train)
        try:
            vocabulary = Vocabulary.from_lines(read_words(train), fingerprint)
        except DataError as error:
            raise DataError(f"{train}: {error}") from error
        vocabulary.save(path)
        return self._with_unknown(vocabulary)

    def _with_unknown(self, vocabulary: Vocabulary) -> Vocabulary:
        return vocabulary.with_unknown() if self._oov == "unk" else vocabulary

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
    """Return the SHA-256 of a file, without the byte order mark that it may begin with.

    Raises:
        DataError: the file is empty.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: copy or download it again")
    with open(path, "rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_indices(text: Path, vocabulary: Vocabulary, oov: OOV, path: Path) -> np.ndarray:
    """Return the (N,) int32 indices of a text file, memory-mapped from `path`; write it if it is missing or damaged.

    Raises:
        DataError: the text cannot be read, or has unknown words under `oov="error"`.
    """
    if (kept := load_array(path)) is not None:
        return kept
    log.info("encoding %s", text)
    count = sum(len(words) + 1 for words in read_words(text))

    def fill(part: Path) -> None:
        array = np.lib.format.open_memmap(part, mode="w+", dtype=np.int32, shape=(count,))
        position = 0
        for line in vocabulary.encode(read_words(text), oov=oov, source=str(text)):
            array[position : position + len(line)] = line
            position += len(line)
        array.flush()

    save_array(path, fill)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def download(paths: Mapping[str, Path]) -> None:
    """Download the missing files of `paths` (split -> file) from Hugging Face.

    Raises:
        DataError: a download fails.
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
                f"wikitext-103-v1 could not be downloaded from Hugging Face ({first_line(error)}): put the "
                f"wiki.*.tokens files into {path.parent}, or try again"
            ) from error

        def fill(part: Path, lines: Any = lines) -> None:
            with open(part, "w", encoding="utf-8") as file:
                for row in lines:
                    file.write(row["text"].rstrip("\n") + "\n")

        write_atomically(path, fill)
