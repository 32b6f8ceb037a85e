"""Tensor subclasses that wrap inner tensors and say which, through ``__tensor_flatten__``.

Such a value is stored as its inner tensors, named ``<fqn>.<attribute>``, and one object
``<fqn>.__tensor_flatten__`` that says how they belong together. On load nothing is rebuilt: the
destination's inner tensors are filled, and its own description must equal the stored one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dcp_engine.errors import UsageError

__all__ = ["FLATTEN_KEY", "OpenedWrapper", "Wrapper", "is_wrapper", "open_wrapper"]

FLATTEN_KEY = "__tensor_flatten__"


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A wrapper subclass, taken apart."""

    inner: dict[str, Any]
    """Attribute name to inner tensor, in the order the class gives them."""
    description: dict[str, Any]
    """Type name, attribute names, context, dtype and shape: equal for values that hold the same
    kind of thing, in any process. Symbolic sizes, which differ by process, are None."""


class OpenedWrapper(torch.Tensor):
    """Stands for a wrapper that was taken apart and whose inner values are now other ones (copies
    of them): described as the original would be, whose class need not be able to hold them.

    A tensor by type, shape and dtype; it has no operations.
    """

    wrapper: Wrapper

    # No operation can mean anything here; without this, torch would try.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, wrapper: Wrapper) -> OpenedWrapper:
        """Make one. Sizes that are not known (symbolic ones) count as 0."""
        shape = tuple(n or 0 for n in wrapper.description["shape"])
        made: OpenedWrapper = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=wrapper.description["dtype"], device=torch.device("cpu")
        )
        made.wrapper = wrapper
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse: only the inner values have content."""
        raise UsageError(f"{func} was called on a tensor subclass that was taken apart")

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return OpenedWrapper, (self.wrapper,)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"OpenedWrapper({self.wrapper!r})"


def is_wrapper(value: Any) -> bool:
    """Does ``value`` follow the ``__tensor_flatten__`` protocol, or stand for one that did?"""
    cls = type(value)
    return cls is OpenedWrapper or (
        isinstance(value, torch.Tensor)
        and hasattr(cls, "__tensor_flatten__")
        and hasattr(cls, "__tensor_unflatten__")
    )


def open_wrapper(value: Any) -> Wrapper:
    """Take ``value`` apart."""
    if isinstance(value, OpenedWrapper):
        return value.wrapper
    attributes, context = value.__tensor_flatten__()
    cls = type(value)
    return Wrapper(
        inner={name: getattr(value, name) for name in attributes},
        description={
            "type": f"{cls.__module__}.{cls.__qualname__}",
            "attributes": list(attributes),
            "context": context,
            "dtype": value.dtype,
            "shape": tuple(n if type(n) is int else None for n in value.shape),
        },
    )
