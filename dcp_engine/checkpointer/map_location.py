"""Where tensors go that are read without a destination: ``torch.load``'s ``map_location``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dcp_engine.errors import UsageError

__all__ = ["Placement"]

_STORED_ON = "cpu"
"""What functions and dicts are asked about: a checkpoint does not say where its tensors were."""


class Placement:
    """What ``map_location`` means.

    Args:
        map_location: None, a device, its name, a dict from names of devices to others, or a
            function of a storage and ``"cpu"`` that returns a storage, or None for no change.
    """

    def __init__(self, map_location: Any) -> None:
        self._move: Callable[[torch.UntypedStorage, str], torch.UntypedStorage | None] | None = None
        if isinstance(map_location, Mapping):
            map_location = map_location.get(_STORED_ON, _STORED_ON)
        elif callable(map_location):
            self._move, map_location = map_location, None
        try:
            self.device = torch.device(_STORED_ON if map_location is None else map_location)
            """Where to allocate."""
        except (RuntimeError, TypeError) as error:
            raise UsageError(
                f"map_location={map_location!r} is no device: {error}",
                hint='pass None, a device such as "cuda:0", a dict, or a function',
            ) from error

    def moved(self, value: Any) -> Any:
        """A value that was read, or a list of every rank's, where it belongs."""
        if isinstance(value, list):
            return [self.moved(item) for item in value]
        if type(value) is not torch.Tensor:
            return value
        if self._move is None:
            return value.to(self.device)
        storage = value.untyped_storage()
        moved = self._move(storage, _STORED_ON)
        if moved is None or moved is storage:
            return value
        return torch.empty(0, dtype=value.dtype, device=moved.device).set_(
            moved, value.storage_offset(), value.shape, value.stride()
        )
