"""The one source of random numbers."""

import hashlib

import torch


def generator(seed: int, path: str) -> torch.Generator:
    """The random numbers for one purpose, which `path` names. They depend on the seed and the name
    alone, not on what was drawn before."""
    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
