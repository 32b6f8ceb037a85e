"""Writers, planners and errors for worker processes: importable there, steered by files.

A gate is a directory: whoever comes to it touches ``entered`` and waits for ``released``.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import dcp_engine as dcp
from dcp_engine.staging.copier import Copier

LIMIT = 60.0


def wait_until(condition: Any, what: str) -> None:
    """Poll with a deadline."""
    end = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen within {LIMIT} s")
        time.sleep(0.01)


@contextmanager
def copying_begins_when() -> Iterator[threading.Event]:
    """Every copy to staging memory in this process waits for the event."""
    begin, copy = threading.Event(), Copier.copy

    def late(*args: Any, **kwargs: Any) -> None:
        assert begin.wait(LIMIT), "nobody let the copying begin"
        copy(*args, **kwargs)

    Copier.copy = late  # type: ignore[method-assign,assignment]
    try:
        yield begin
    finally:
        Copier.copy = copy  # type: ignore[method-assign]


class Gate:
    """Made by the test; travels pickled."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    def stop_here(self) -> None:
        """Called by whoever is to be held up."""
        (self.directory / "entered").touch()
        wait_until((self.directory / "released").exists, "the release")

    def wait_for_visitor(self) -> None:
        """Until somebody is held up."""
        wait_until((self.directory / "entered").exists, "the call")

    def open(self) -> None:
        """Let everybody go."""
        (self.directory / "released").touch()


class GatedWriter(dcp.FileSystemWriter):
    """Waits before or after one of its methods, which is otherwise the engine's own."""

    def __init__(self, path: Path | str, gate: Gate, method: str, *, after: bool = False) -> None:
        super().__init__(path)
        self.gate, self.method, self.after = gate, method, after

    def observe(self, *args: Any) -> Any:
        return self._held("observe", *args)

    def begin_save(self, *args: Any) -> Any:
        return self._held("begin_save", *args)

    def write_columns(self, *args: Any) -> Any:
        return self._held("write_columns", *args)

    def commit_columns(self, *args: Any) -> Any:
        return self._held("commit_columns", *args)

    def end_save(self, *args: Any) -> Any:
        return self._held("end_save", *args)

    def _held(self, method: str, *args: Any) -> Any:
        if method == self.method and not self.after:
            self.gate.stop_here()
        result = getattr(super(), method)(*args)
        if method == self.method and self.after:
            self.gate.stop_here()
        return result


class HeldWriter(dcp.FileSystemWriter):
    """Where it is unpickled in another process, holds that one up before or after a call there.

    Args:
        method: ``module:function`` or ``module:Class.method``.
    """

    def __init__(self, path: Path | str, gate: Gate, method: str, *, after: bool = False) -> None:
        super().__init__(path)
        self.gate, self.method, self.after = gate, method, after
        self.made_in = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if os.getpid() == self.made_in:
            return
        module, _, path = self.method.partition(":")
        *names, attribute = path.split(".")
        owner = reduce(getattr, names, importlib.import_module(module))
        gate, after, real = self.gate, self.after, getattr(owner, attribute)

        def held(*args: Any, **kwargs: Any) -> Any:
            if not after:
                gate.stop_here()
            result = real(*args, **kwargs)
            if after:
                gate.stop_here()
            return result

        setattr(owner, attribute, held)


class Unpicklable(Exception):
    """Holds something that no pickle takes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Boom(Exception):
    """What an injected fault raises."""


class FailingWriter(dcp.FileSystemWriter):
    """Raises in ``write_columns``, and may be held up as it tidies up after that."""

    def __init__(
        self, path: Path | str, *, unpicklable: bool = False, gate: Gate | None = None
    ) -> None:
        super().__init__(path)
        self.unpicklable, self.gate = unpicklable, gate

    def abort_save(self) -> None:
        if self.gate is not None:
            self.gate.stop_here()
        super().abort_save()

    def write_columns(self, *args: Any) -> Any:
        raise Unpicklable("not to be pickled") if self.unpicklable else Boom("on purpose")


class CountingPlanner(dcp.DefaultSavePlanner):
    """Overrides a method, so that DCP's life cycle runs, and changes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.plans = 0

    def create_local_plan(self) -> dcp.SavePlan:
        self.plans += 1
        return super().create_local_plan()


class UnpicklablePlanner(CountingPlanner):
    """Cannot go to a worker."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
