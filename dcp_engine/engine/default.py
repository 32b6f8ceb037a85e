"""The default engine of each process group: made on first use, closed at exit.

The one place of the package with mutable module state.
"""

from __future__ import annotations

import atexit
import os
import threading

import torch.distributed as dist

from dcp_engine.engine.engine import Engine

__all__ = ["close_default_engines", "default_engine"]

_lock = threading.Lock()
_engines: dict[int, tuple[object, Engine]] = {}
"""By id of the process group (held beside, so that the id stays its own); 0 is no group."""
_parents: list[tuple[object, Engine]] = []
"""What a fork was born with. Kept, so that nothing of its parent's is taken down in it."""


def default_engine(process_group: dist.ProcessGroup | None = None) -> Engine:
    """The engine that the module functions use for ``process_group``.

    One whose group was destroyed is closed and replaced, and so is one that somebody closed. A
    fork gets one of its own.
    """
    group = process_group
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    with _lock:
        for key, (held, engine) in list(_engines.items()):
            if held is not None and not _alive(held):
                del _engines[key]
                engine.close_at_exit()
        key = 0 if group is None else id(group)
        if key not in _engines or _engines[key][1].closed:
            _engines[key] = (group, Engine(process_group))
        return _engines[key][1]


def close_default_engines() -> None:
    """Close every default engine; called at exit."""
    with _lock:
        engines = [engine for _, engine in _engines.values()]
        _engines.clear()
    for engine in engines:
        engine.close_at_exit()


def _begin_anew() -> None:
    """In a fork: the engines are its parent's, and the lock may be held by a thread of that one."""
    global _lock
    _lock = threading.Lock()
    _parents.extend(_engines.values())
    _engines.clear()


def _alive(group: object) -> bool:
    """Whether torch still knows the group: a destroyed one has lost its name and its store."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return group in dist.distributed_c10d._world.pg_map


atexit.register(close_default_engines)
os.register_at_fork(after_in_child=_begin_anew)
