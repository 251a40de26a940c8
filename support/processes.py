"""One process or many, as torchrun starts them."""

import atexit
import os

import torch
import torch.distributed as dist


def start_processes(args):
    """Join the other processes, if torchrun started this one, and take the GPU of its number."""
    if not dist.is_torchelastic_launched():
        return
    if args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    atexit.register(dist.destroy_process_group)


def processes():
    """(number of this process among those of torchrun, how many there are), or (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_rows(parts):
    """Join [{name: [n, ...]}, ...] of all processes in their order: {name: [N, ...]} on the CPU."""
    parts = [{name: values.cpu() for name, values in part.items()} for part in parts]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, parts)
        parts = [part for one in everyone for part in one]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def count_over_processes(count):
    """Return the sum of a count over all processes."""
    return int(gather_rows([{"count": torch.tensor([count])}])["count"].sum())
