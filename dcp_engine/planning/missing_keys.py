"""What to say of a key that a destination has and the checkpoint has not.

Belongs here: the error, which looks at the names that are stored. Does not belong here: whether a
key that is missing is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized

from dcp_engine.errors import StateMismatchError
from dcp_engine.state.values import TensorValue, Value

__all__ = ["missing_key"]

_FILL = (
    "fill the destination first, so that every value has its place there: an optimizer by one "
    "step, or by torch.distributed.checkpoint.state_dict.get_state_dict"
)
_PARTIAL = (
    "remove the key from the state dict, or load with DefaultLoadPlanner(allow_partial_load=True)"
)


def missing_key(
    value: Value, stored: Iterable[str], *, rank: int | None = None, for_this_rank: bool = False
) -> StateMismatchError:
    """The error for ``value`` of a destination, whose key is not among the names ``stored``.

    Args:
        for_this_rank: other ranks' values are stored under this key.
    """
    fqn, is_tensor = value.fqn, isinstance(value, TensorValue)
    held = "does not hold this tensor" if is_tensor else "does not hold this key"
    message = f"the checkpoint {held}" + (" for this rank" if for_this_rank else "")
    hint: str | None = _PARTIAL
    names = set(stored)
    below = sum(name.startswith(f"{fqn}.") for name in names)
    if below:
        values = "1 value" if below == 1 else f"{below} values"
        message += f", but {values} below it; the destination is {_described(value)}"
        hint = _FILL if _is_empty(value) else None
    elif above := [part for part in _prefixes(fqn) if part in names]:
        message += f", but one value {above[0]!r}; the destination has a container in its place"
        hint = None
    return StateMismatchError(message, kind="missing_key", tensor=fqn, rank=rank, hint=hint)


def _prefixes(fqn: str) -> list[str]:
    """``a.b`` and ``a`` of ``a.b.c``."""
    return [fqn[:at] for at in range(len(fqn) - 1, 0, -1) if fqn[at] == "."]


def _is_empty(value: Value) -> bool:
    """Whether it is a container without values, which is one object."""
    if isinstance(value, TensorValue) or isinstance(value.value, str | bytes):
        return False
    return isinstance(value.value, Sized) and len(value.value) == 0


def _described(value: Value) -> str:
    if isinstance(value, TensorValue):
        return "a tensor"
    name = type(value.value).__name__
    return f"an empty {name}" if _is_empty(value) else f"one value of type {name}"
