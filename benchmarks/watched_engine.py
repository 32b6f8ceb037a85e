"""An ``Engine`` that notes what each of its saves asks of the store.

Belongs here: the counting around the steps of a save; it is the one place of the benchmarks that
reaches into the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dcp_engine import Engine
from dcp_engine.coordination.interface import Decision
from dcp_engine.coordination.open_session import open_session
from dcp_engine.coordination.operation import StoreOperation
from dcp_engine.coordination.store import StoreSession

__all__ = ["WatchedEngine"]

_PLANNING = frozenset({"agree", "plan", "compare"})


class WatchedEngine(Engine):
    """Saves as its base does; ``take`` tells of the last one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        session = open_session(None)
        if not isinstance(session, StoreSession):
            raise RuntimeError("this job has no store")
        self._sessions.use(session)
        self._watched = session
        self._planning = self._describing = 0.0
        self._before = session.counters
        begin = session.begin

        def begin_watched(*args: Any, **kwargs: Any) -> StoreOperation:
            operation = begin(*args, **kwargs)
            step = operation.step

            def timed(
                phase: str,
                local: Callable[[], bytes],
                decide: Callable[[list[bytes]], Decision],
                **options: Any,
            ) -> tuple[bytes, bytes]:
                if phase not in _PLANNING:
                    return step(phase, local, decide, **options)

                def timed_local() -> bytes:
                    began = time.perf_counter()
                    try:
                        return local()
                    finally:
                        self._describing += time.perf_counter() - began

                began = time.perf_counter()
                try:
                    return step(phase, timed_local, decide, **options)
                finally:
                    self._planning += time.perf_counter() - began

            operation.step = timed  # type: ignore[method-assign]
            return operation

        session.begin = begin_watched  # type: ignore[method-assign]

    @property
    def connections(self) -> int:
        """Connections to the store that this rank opened."""
        return self._watched.counters.connections

    def take(self) -> dict[str, float]:
        """Planning time and traffic since the last call."""
        now, before = self._watched.counters, self._before
        planning, describing = self._planning, self._describing
        self._before, self._planning, self._describing = now, 0.0, 0.0
        return {
            "plan_ms": planning * 1e3,
            "own_ms": describing * 1e3,
            "bytes_out": now.bytes_out - before.bytes_out,
            "bytes_in": now.bytes_in - before.bytes_in,
            "calls": now.total - before.total,
        }
