"""Other libraries' ways to save and load, where they are installed.

Belongs here: one small class per library, and saying which of them there are. Does not belong
here: torch's own DCP and safetensors, which are always there (``io_columns``).
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from typing import Any

import torch

from benchmarks.io_columns import Way

__all__ = ["TorchCheckpointing", "TorchSnapshot", "missing_rivals", "rivals"]


class TorchSnapshot:
    """``Snapshot.take`` and ``restore``; it has no fsync."""

    name = "torchsnapshot"

    def __init__(self) -> None:
        self._library = importlib.import_module("torchsnapshot")

    def save(self, state: dict[str, Any], path: str) -> None:
        shutil.rmtree(path, ignore_errors=True)
        self._library.Snapshot.take(path, self._app(state))

    def load(self, state: dict[str, Any], path: str) -> None:
        self._library.Snapshot(path).restore(self._app(state))

    def _app(self, state: dict[str, Any]) -> dict[str, Any]:
        return {"state": self._library.StateDict(**state)}


class TorchCheckpointing:
    """``CheckpointManager`` with the synchronous saver; it has no fsync."""

    name = "torch_checkpointing"

    def __init__(self) -> None:
        library = importlib.import_module("torch_checkpointing")
        config = library.CheckpointManager.Config(save=library.SyncCheckpointSaverConfig())
        self._manager = library.CheckpointManager(config)

    def save(self, state: dict[str, Any], path: str) -> None:
        shutil.rmtree(path, ignore_errors=True)
        self._manager.save(path, state)

    def load(self, state: dict[str, Any], path: str) -> None:
        self._manager.load(path, into=state)


_LIBRARIES: dict[str, type[Way]] = {
    TorchSnapshot.name: TorchSnapshot,
    TorchCheckpointing.name: TorchCheckpointing,
}


def missing_rivals() -> dict[str, str]:
    """By library, why it is not measured."""
    missing = {}
    for name in _LIBRARIES:
        if importlib.util.find_spec(name) is None:
            missing[name] = "not installed"
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a library for another torch does on import
            missing[name] = f"does not run here: {type(error).__name__}: {error}"
    return missing


def rivals(root: str) -> list[Way]:
    """Those that can be measured with files below ``root``; says which ones fail there (direct
    I/O, for one, is not for every disk)."""
    absent = missing_rivals()
    found: list[Way] = []
    for name, make in _LIBRARIES.items():
        if name in absent:
            continue
        try:
            way = make()
            for value in (0.0, 1.0):
                state = {"model": {"a": torch.full((100, 33), value), "b": torch.ones(7)}}
                way.save(state, f"{root}/probe")
                way.load(state, f"{root}/probe")
        except Exception as error:  # whatever it does on another system than its own
            print(f"not measured: {name} below {root}: {type(error).__name__}: {error}\n")
        else:
            found.append(way)
        finally:
            shutil.rmtree(f"{root}/probe", ignore_errors=True)
    return found
