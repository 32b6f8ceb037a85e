"""Tensor subclasses that wrap inner tensors and say which, through ``__tensor_flatten__``.

Such a value is stored as its inner tensors, named ``<fqn>.<attribute>``, and one object
``<fqn>.__tensor_flatten__`` that says how they belong together. On load nothing is rebuilt: the
destination's inner tensors are filled, and its own description must equal the stored one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["FLATTEN_KEY", "Wrapper", "is_wrapper", "open_wrapper"]

FLATTEN_KEY = "__tensor_flatten__"


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A wrapper subclass, taken apart."""

    inner: dict[str, Any]
    """Attribute name to inner tensor, in the order the class gives them."""
    description: dict[str, Any]
    """Type name, attribute names, context, dtype and shape: equal for values that hold the same
    kind of thing, in any process. Symbolic sizes, which differ by process, are None."""


def is_wrapper(value: Any) -> bool:
    """Does ``value`` follow the ``__tensor_flatten__`` protocol?"""
    cls = type(value)
    return (
        isinstance(value, torch.Tensor)
        and hasattr(cls, "__tensor_flatten__")
        and hasattr(cls, "__tensor_unflatten__")
    )


def open_wrapper(value: Any) -> Wrapper:
    """Take ``value`` apart."""
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
