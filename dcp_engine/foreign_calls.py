"""What it takes to call planners, writers and readers of other origin as torch's DCP calls them.

Belongs here: how their objects travel, and which arguments they take. Does not belong here: the
order of the calls (``saver.item_based``, ``loader.item_based``).
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from typing import Any

__all__ = ["ObjectMail", "takes_keywords"]


class ObjectMail:
    """Sends objects as bytes: pickled between ranks, and as they are where there is one rank, so
    that on one rank nothing has to be picklable, as in torch's DCP."""

    def __init__(self, world_size: int) -> None:
        self._alone = world_size == 1
        self._kept: list[Any] = []

    def send(self, value: Any) -> bytes:
        """The bytes that stand for ``value``."""
        if not self._alone:
            return pickle.dumps(value)
        self._kept.append(value)
        return str(len(self._kept) - 1).encode()

    def open(self, message: bytes) -> Any:
        """The value, or its copy."""
        return self._kept[int(message)] if self._alone else pickle.loads(message)


def takes_keywords(method: Callable[..., Any]) -> bool:
    """Whether ``method`` takes any keyword. DCP's ``set_up_*`` methods got ``rank`` and
    ``use_collectives`` late, so torch passes them only to those that declare ``**kwargs``."""
    parameters = inspect.signature(method).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
