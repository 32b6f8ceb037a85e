"""The ``Stateful`` protocol: objects that give and take their own state dict."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, runtime_checkable

__all__ = ["Stateful", "StatefulT"]


@runtime_checkable
class Stateful(Protocol):
    """An object that can be saved and restored as a value of a state dict."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to store. Also called by ``load``, which fills its tensors in place."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``load`` read into the mapping that ``state_dict`` returned."""
        ...


StatefulT = TypeVar("StatefulT", bound=Stateful)
