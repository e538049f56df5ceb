"""A graphics card that is not there: tensors "on" it lie in memory, and torch refuses to mix them with others.

So a machine without one tells what would fail on one: operands on two devices, numpy on what is not in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

THERE = torch.device("cuda")
DEVICE, IS_CUDA = Tensor.device.__get__, Tensor.is_cuda.__get__  # type: ignore[attr-defined]
MIXES = {"copy_", "to", "cpu", "__getitem__", "__setitem__"}


def is_there(tensor: Tensor) -> bool:
    return getattr(tensor, "_there", False)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def put(found: Any, there: bool) -> Any:
    for tensor in tensors_in(found):
        tensor._there = there  # type: ignore[attr-defined]
    return found


class Elsewhere(TorchFunctionMode):
    """Tensors know where they would be; what torch does with them stays the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func in (DEVICE, IS_CUDA):
            there = is_there(args[0])
            return (THERE if there else func(args[0])) if func == DEVICE else there
        given = list(tensors_in([args, kwargs]))
        there = any(map(is_there, given))
        if name in ("numpy", "__array__") and there:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first")
        if name == "cpu":
            return put(args[0].clone(), False)
        if name == "to":
            return self._to(*args, **kwargs)
        if name == "__getitem__" and not is_there(args[0]) and there:
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if name not in MIXES and len({is_there(one) for one in given if one.dim() or is_there(one)}) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, in {name}")
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == THERE.type
            kwargs["device"] = "cpu"
        if name in ("copy_", "__setitem__"):
            there = is_there(args[0])
        found = func(*args, **kwargs)
        if name == "__iter__":
            return iter([put(one, there) for one in found])
        return put(found, there)

    def _to(self, tensor: Tensor, *how: Any, **more: Any) -> Tensor:
        """`Tensor.to` of a device, a type of numbers, both, or another tensor."""
        there, was = is_there(tensor), is_there(tensor)
        for part in (*how, *more.values()):
            if isinstance(part, Tensor):
                tensor, there = tensor.to(part.dtype), is_there(part)
            elif isinstance(part, torch.dtype):
                tensor = tensor.to(part)
            elif part is not None:
                there = torch.device(part).type == THERE.type
        if how and isinstance(how[0], torch.dtype) and len(how) > 1:
            raise TypeError("to() received an invalid combination of arguments")
        return put(tensor if there == was else tensor.clone(), there)


@contextmanager
def elsewhere() -> Iterator[None]:
    """There is a graphics card within the block."""
    with pytest.MonkeyPatch.context() as patch, Elsewhere():
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        yield
