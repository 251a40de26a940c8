"""Random numbers of a run: each use has a generator of its own, so that resuming needs no state."""

import hashlib

import torch

from support.processes import processes


def seeded(seed, use, device="cpu"):
    """Make a generator for one use of a run's seed: no two uses draw the same numbers."""
    digest = hashlib.sha256(f"{seed} {use}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "big") // 2)


def draw_groups(seed, iteration, prompts, groups):
    """Draw the groups of an iteration: indices of their prompts [G], and seeds of their noise."""
    draws = seeded(seed, f"groups {iteration}")
    cond = torch.randint(prompts, (groups,), generator=draws)
    return cond, torch.randint(2**31, (groups,), generator=draws).tolist()


def drawn_prompts(args, prompts, shared_out):
    """Return the indices of the prompts that this process will draw in a run.

    prompts: how many there are to draw from
    shared_out: whether each process has its own groups; if not, it has all of them
    """
    rank, world = processes() if shared_out else (0, 1)
    drawn = set()
    for iteration in range(1, args.iterations + 1):
        cond, _ = draw_groups(args.seed, iteration, prompts, args.groups)
        drawn |= set(cond.tensor_split(world)[rank].tolist())
    return sorted(drawn)
