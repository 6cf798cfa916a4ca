"""Seeds by name: a draw depends on its key alone, never on earlier draws."""

from __future__ import annotations

import hashlib

import torch


def seed_of(key: str) -> int:
    """Return a 56-bit seed for `key`, such as "order/<seed>/<epoch>"."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")


def generator(key: str) -> torch.Generator:
    """Return a generator seeded by `key`."""
    return torch.Generator().manual_seed(seed_of(key))
