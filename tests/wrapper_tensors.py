"""A wrapper subclass as torchao makes them: quantised weights."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Scaled"]


class Scaled(torch.Tensor):
    """Data, scales, and a context."""

    @staticmethod
    def __new__(cls, data: Any, scale: Any, bits: int) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data: Any, scale: Any, bits: int) -> None:
        self.data_, self.scale, self.bits = data, scale, bits

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["data_", "scale"], {"bits": self.bits}

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Scaled:
        return cls(inner["data_"], inner["scale"], context["bits"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)
