"""A pretended GPU: tensors that say they are on cuda:0, by PyTorch's own rules of which may mix.

    with fake_gpu():
        train.main()  # with --device cuda, and the numbers of the CPU

A tensor in the wrong place raises the error that it raises on a card. Kernels of the GPU are not
tested.
"""

from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.resources import files
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# to PyTorch's C++ our tensors are on "meta", the only device that has autograd and needs no driver
CPU, GPU, META = (torch.device(name) for name in ("cpu", "cuda:0", "meta"))
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)


@cache
def iterated():
    """The operators that leave the check of devices to TensorIterator, by PyTorch's own list."""
    text = (files("torchgen") / "packaged/ATen/native/native_functions.yaml").read_text()
    blocks = text.split("\n- func: ")[1:]
    return {"aten::" + block.split("(")[0] for block in blocks if "device_check: NoCheck" in block}


def mapped(function, a):
    """Apply a function to a tensor, or to all tensors in nested lists and tuples."""
    if isinstance(a, list | tuple):
        return type(a)(mapped(function, b) for b in a)
    return function(a) if isinstance(a, torch.Tensor) else a


def check_devices(operator, args, kwargs):
    """RuntimeError if PyTorch would refuse an operator because of the devices of its tensors."""
    tensors = []
    mapped(tensors.append, [*args, *kwargs.values()])
    kind = operator.overloadpacket
    if kind in (aten.copy_, aten._foreach_copy_):  # Copy.cpp: from any device to any
        return
    if kind in INDEXING:
        # TensorAdvancedIndexing.cpp: indices may be on the CPU, and a single value
        x, indices, *values = args
        if any(i is not None and i.device not in (CPU, x.device) for i in indices):
            where = f"on cpu or on the same device as the indexed tensor ({x.device})"
            raise RuntimeError(f"indices should be either {where}")
        tensors = [x, *(value for value in values[:1] if value.dim() > 0)]
    elif operator.name() in iterated():
        # TensorIterator.cpp: one number may be on the CPU, but no result
        numbers = [a for a in tensors if a.dim() == 0 and a.device == CPU]
        others = [a for a in tensors if a.dim() > 0 or a.device != CPU]
        # TensorCompare.cpp: where takes as many as there are
        allowed = len(numbers) if kind is aten.where else 1
        tensors = others + numbers[allowed:] if others else []
        if others and operator._schema.name.endswith("_"):
            mapped(tensors.append, args[0])
    # RegisterCUDA.cpp, generated: all others (cat, embedding, gather, matmul ...) want one device
    if len({a.device for a in tensors}) > 1:
        found = ", ".join(f"{list(a.shape)} on {a.device}" for a in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device: {operator} of {found}")


class GPUTensor(torch.Tensor):
    """A tensor on the fake GPU. `values`, on the CPU, computes for it."""

    @staticmethod
    def __new__(cls, values):
        like = {"dtype": values.dtype, "storage_offset": values.storage_offset()}
        like |= {"strides": values.stride(), "device": META}
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, **like)

    def __init__(self, values):
        self.values = values

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl
    __tensor_flatten__ = __tensor_unflatten__ = None  # so that Module.to swaps parameters

    def __reduce_ex__(self, protocol):  # what torch.load(map_location="cpu") reads is on the CPU
        return self.values.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        raise RuntimeError("a tensor of the fake GPU is used outside of fake_gpu()")


class Generator(torch.Generator):
    """A generator of the CPU that says it is on another device."""

    device = property(lambda self: self.named)

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator.named = torch.device(device)
        return generator


class Operators(TorchDispatchMode):
    """Checks every operator, below autograd, and computes it with the values."""

    # Python code that says meta, to load weights, means it; C++ means the fake GPU
    meta_is_meant = False

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs, outer = kwargs or {}, {}
        check_devices(operator, args, kwargs)

        def values(tensor):
            inner = tensor.values if isinstance(tensor, GPUTensor) else tensor
            outer[id(inner)] = tensor
            return inner

        inner = mapped(values, args)
        options = {name: mapped(values, a) for name, a in kwargs.items()}
        on_gpu = any(isinstance(tensor, GPUTensor) for tensor in outer.values())
        if kwargs.get("device") is not None:
            on_gpu = kwargs["device"].type != "cpu" and not Operators.meta_is_meant
            options["device"] = CPU if on_gpu else kwargs["device"]

        def wrap(tensor):
            if id(tensor) in outer:
                return outer[id(tensor)]
            return GPUTensor(tensor) if on_gpu else tensor

        return mapped(wrap, operator(*inner, **options))


class Functions(TorchFunctionMode):
    """Changes calls so that PyTorch's C++ neither looks for a driver nor bypasses `Operators`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        from_another_mode = isinstance(function, torch._ops.OpOverload)
        if from_another_mode or function in (torch.device, torch._C._nn._parse_to):
            return function(*args, **kwargs)
        if kwargs.get("generator") is not None:  # Generator.h: has to be of the result's device
            own = [a.device for a in args if isinstance(a, torch.Tensor)]
            device, found = kwargs.get("device") or [*own, CPU][0], kwargs["generator"].device
            if torch.device(device).type != found.type:
                text = f"Expected a '{device}' device type for generator but found '{found}'"
                raise RuntimeError(text)
        if function == torch.Tensor.data.__set__ and isinstance(args[0], GPUTensor):
            args[0].values = args[1].values
        if function is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        if function is torch.Tensor.new_tensor:
            kwargs = {"dtype": args[0].dtype, "device": args[0].device} | kwargs
            function, args = torch.tensor, args[1:]
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(i) if isinstance(i, list) else i for i in index)
            args = (args[0], index, *args[2:])
        if function is torch.tensor:  # of numbers on the GPU, which it reads
            args = (mapped(torch.Tensor.cpu, args[0]), *args[1:])
        meant = any(is_device(a, "meta") for a in (*args, *kwargs.values()))
        args = [META if is_device(a, "cuda") else a for a in args]
        kwargs = {name: META if is_device(a, "cuda") else a for name, a in kwargs.items()}
        made_of_numbers = function in (torch.tensor, torch.as_tensor)
        if made_of_numbers and kwargs.get("device") == META and not meant:
            return function(*args, **kwargs | {"device": None}).to(META)
        Operators.meta_is_meant = meant
        try:
            return function(*args, **kwargs)
        finally:
            Operators.meta_is_meant = False


def is_device(a, kind):
    return isinstance(a, str | torch.device) and str(a).split(":")[0] == kind


def backward(loss):
    """loss.backward(), which would leave `Functions`, where checkpoints compute again."""
    engine, one = torch.autograd.Variable._execution_engine, torch.ones_like(loss)
    flags = {"allow_unreachable": True, "accumulate_grad": True}
    engine.run_backward((loss,), (one,), False, False, (), **flags)


@contextmanager
def fake_gpu():
    """Inside, "cuda" is the fake GPU."""
    answers = {"is_available": True, "is_bf16_supported": True, "_lazy_init": None}
    answers |= {"synchronize": None, "max_memory_allocated": 0, "get_device_name": "pretended"}
    with ExitStack() as stack:
        for name, answer in answers.items():
            patch = mock.patch.object(torch.cuda, name, mock.Mock(return_value=answer))
            stack.enter_context(patch)
        stack.enter_context(mock.patch("torch.Generator", Generator))
        stack.enter_context(mock.patch("torch.Tensor.backward", backward))
        stack.enter_context(Operators())
        stack.enter_context(Functions())
        yield
