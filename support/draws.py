"""Random numbers of a run, each use from a generator of its own."""

import hashlib

import torch


def seeded(seed, use, device="cpu"):
    """A random generator for one use of a run's seed, so that no two uses draw the same noise."""
    digest = hashlib.sha256(f"{seed} {use}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "big") // 2)
