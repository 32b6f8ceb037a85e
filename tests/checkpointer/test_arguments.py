"""Names, arguments and defaults are those of torch's package of this kind."""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

MODULES = (
    "barriers",
    "builder",
    "checkpoint_process",
    "checkpoint_reader",
    "checkpoint_writer",
    "checkpointer",
    "config",
    "staging",
    "types",
    "utils",
)
THEIRS = "torch.distributed.checkpoint._experimental"


def public() -> Iterator[Any]:
    """Classes and functions of torch's, with ours of the same module and name."""
    pytest.importorskip(THEIRS, reason="this torch has no such package")
    for module in MODULES:
        theirs = import_module(f"{THEIRS}.{module}")
        ours = import_module(f"dcp_engine.checkpointer.{module}")
        for name, value in vars(theirs).items():
            is_own = getattr(value, "__module__", None) == theirs.__name__
            if callable(value) and is_own and not name.startswith("_"):
                yield pytest.param(value, getattr(ours, name, None), id=f"{module}.{name}")


def arguments(function: Any) -> dict[str, tuple[Any, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: (p.kind, p.default) for p in parameters if p.name != "self"}


def compare(theirs: Any, ours: Any) -> None:
    """Ours takes what theirs takes, in its order; what ours has beside may be left out."""
    wanted, found = arguments(theirs), arguments(ours)
    assert [name for name in found if name in wanted] == list(wanted)
    for name, (kind, default) in wanted.items():
        assert found[name][0] == kind, name
        if dataclasses.is_dataclass(default):
            # Ours is made at the call.
            assert found[name][1] is None, name
        elif not inspect.isfunction(default):
            assert found[name][1] == default, name
    for name in found.keys() - wanted.keys():
        assert found[name][1] is not inspect.Parameter.empty, name


@pytest.mark.parametrize(("theirs", "ours"), list(public()))
def test_it_takes_what_torchs_takes(theirs: Any, ours: Any) -> None:
    assert ours is not None
    if inspect.isclass(theirs) and issubclass(theirs, enum.Enum):
        assert [(m.name, m.value) for m in theirs] == [(m.name, m.value) for m in ours]
        return
    compare(theirs, ours)
    if not inspect.isclass(theirs):
        return
    for name, method in vars(theirs).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            compare(method, getattr(ours, name))
    if dataclasses.is_dataclass(theirs):
        names = [field.name for field in dataclasses.fields(theirs)]
        assert [field.name for field in dataclasses.fields(ours)][: len(names)] == names
