"""From the bytes of picture files to a batch of pixels: the only place that knows a decoder."""

from __future__ import annotations

import functools
import importlib
import io
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.seeding import seed_of
from phantom.engine.errors import DataError, first_line

Transform = Callable[[Tensor], Tensor]
# how PNG begins, and BMP, TIFF and the six kinds of PPM. A damaged PNG crashes the process in torchvision, which does
# not read the others
FOR_PILLOW = (b"\x89PNG", b"BM", b"II*\0", b"MM\0*", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")


class Example(NamedTuple):
    """A picture as it is stored.

    Args:
        encoded: the bytes of its file.
        name: where it is, for messages.
    """

    encoded: bytes
    label: int
    name: str


def decode(encoded: bytes, name: str) -> Tensor:
    """Return the pixels (3, H, W) uint8 of a picture in colours; a grey one has three equal channels.

    Of an animation it is the first frame.

    torchvision decodes straight into a tensor, in three quarters of Pillow's time. With a torchvision that has no
    decoders any more, this takes torchcodec's. Pillow decodes the formats of `FOR_PILLOW`. Of 16 bits 8 are kept.

    Raises:
        DataError: the bytes are no picture, or not all of one; `name` says which.
    """
    try:
        if encoded.startswith(FOR_PILLOW):
            return _with_pillow(encoded)
        buffer = torch.frombuffer(bytearray(encoded or b"\0"), dtype=torch.uint8)
        with warnings.catch_warnings():
            # torchvision 0.29 says at every call that torchcodec takes over
            warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities")
            pixels = _decoder()(buffer)
        return pixels if pixels.dim() == 3 else pixels[0]
    except (RuntimeError, ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = first_line(error)
        raise DataError(
            f"the picture {name} is damaged and cannot be decoded ({reason}): replace or remove it"
        ) from error


def batch_of(pairs: Iterable[tuple[str, Example]], transform: Transform) -> tuple[Tensor, Tensor]:
    """Return the batch (B, 3, H, W) uint8 of transformed pictures, and their labels (B,) int64.

    Args:
        pairs: (key, example); what the transform draws for an example depends on its key alone.
        transform: draws from torch's global generator, whose state this call leaves alone.

    Raises:
        DataError: a picture cannot be decoded.
    """
    images, labels = [], []
    with torch.random.fork_rng(devices=[]):
        for key, example in pairs:
            image = decode(example.encoded, example.name)
            torch.default_generator.manual_seed(seed_of(key))  # torch.manual_seed takes 0.1 ms: it sees to all devices
            images.append(transform(image))
            labels.append(example.label)
    return torch.stack(images).contiguous(), torch.tensor(labels)


def _with_pillow(encoded: bytes) -> Tensor:
    with Image.open(io.BytesIO(encoded)) as picture:
        if picture.mode.startswith("I;16"):  # Pillow's own conversion cuts them off at 255
            picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
        elif picture.mode in ("I", "F"):
            raise ValueError(f"its pixels are of Pillow's mode {picture.mode}: save it with 8 or 16 bits")
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


@functools.cache
def _decoder() -> Callable[[Tensor], Tensor]:
    try:
        from torchvision.io import ImageReadMode, decode_image
    except ImportError:
        torchcodec = importlib.import_module("torchcodec.decoders")
        return lambda buffer: torchcodec.decode_image(buffer, mode="RGB")
    return lambda buffer: decode_image(buffer, mode=ImageReadMode.RGB)
