"""What the phases of a computation use: seconds, operations and memory, also of shapes alone."""

import time
from contextlib import contextmanager
from unittest import mock
from weakref import finalize

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options
):
    """As the GPU's kernel computes it; for meta PyTorch has the formula, which takes more memory."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    return kernel(query, key, value, dropout_p, is_causal, scale=scale)[0]


class Generator(torch.Generator):
    """A generator of the CPU that says it is on another device."""

    device = property(lambda self: self.named)

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator.named = torch.device(device)
        return generator


@contextmanager
def shapes_only():
    """Inside, tensors on meta are computed with as on a GPU, but without values: one that is read is 0."""
    read = torch.Tensor.tolist

    def tolist(tensor):
        return read(torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor)

    with (
        mock.patch("torch.Tensor.tolist", tolist),
        mock.patch("torch.Generator", Generator),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
    ):
        yield


class Profiler(TorchDispatchMode):
    """A table {phase: [seconds, operations, peak bytes]}, each without those of the phases inside it."""

    def __init__(self, device):
        super().__init__()
        self.device, self.operations, self.live, self.known = device, 0, 0, set()
        self.table, self.phase, self.last = (
            {"preparing": [0, 0, 0]},
            "preparing",
            (time.perf_counter(), 0),
        )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Count operations, and follow the storage of every result until it is freed."""
        result = function(*args, **kwargs or {})
        if function.overloadpacket in flop_registry:
            self.operations += flop_registry[function.overloadpacket](
                *args, **kwargs or {}, out_val=result
            )
        for tensor in result if isinstance(result, tuple | list) else [result]:
            on_meta = isinstance(tensor, torch.Tensor) and tensor.device.type == "meta"
            storage = tensor.untyped_storage() if on_meta else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.table[self.phase][2] = max(self.table[self.phase][2], self.live)
        return result

    def free(self, key, size):
        self.known.discard(key)
        self.live -= size

    def enter(self, phase):
        """Add what happened since the last call to the current phase; start another, return the former."""
        row, former = self.table[self.phase], self.phase
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
            row[2] = max(row[2], torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter(), self.operations
        row[:2] = [total + b - a for total, a, b in zip(row, self.last, now)]
        self.phase, self.last = phase, now
        self.table.setdefault(phase, [0, 0, 0])
        return former

    def profiled(self, phase, function):
        """The function, with what it uses counted under the name of a phase."""

        def wrapper(*args, **options):
            outer = self.enter(phase)
            result = function(*args, **options)
            self.enter(outer)
            return result

        return wrapper
