"""State dicts for asynchronous saves, a writer that can be held up, and what a load gives back."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

import dcp_engine as dcp
from storage_backends.testing.faulty import Hang
from storage_backends.testing.faulty_calls import CallFault, faulty_writer


def every_kind(value: float = 1.0) -> dict[str, Any]:
    """Tensors in every memory layout that a CPU has, and objects."""
    value = float(value)
    base = torch.arange(60, dtype=torch.float32).reshape(6, 10) + value
    return {
        "plain": base.clone(),
        "transposed": base.clone().t(),
        "strided": base.clone()[::2, 1::3],
        "view": base.clone()[1:3, 2:4],
        "expanded": torch.full((1, 4), value).expand(3, 4),
        "scalar": torch.tensor(value),
        "empty": torch.empty(0, 3),
        "half": torch.full((7,), value, dtype=torch.bfloat16),
        "bits": torch.tensor([True, False, True]),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "complex": torch.full((3,), complex(value, 1), dtype=torch.complex64),
        "conjugate": torch.full((3,), complex(value, 1), dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(torch.full((5,), value)),
        "large": torch.full((300, 1000), value),
        "step": int(value),
        "options": {"lr": value, "betas": (0.9, 0.95), "names": ["a", {"b": value}]},
        "text": f"value {value}",
    }


def destination() -> dict[str, Any]:
    """What ``every_kind`` is loaded into; nothing in it is what was saved."""
    result: dict[str, Any] = {}
    for name, value in every_kind(-77.0).items():
        if isinstance(value, torch.Tensor):
            result[name] = torch.zeros(value.shape, dtype=value.dtype)
        else:
            result[name] = value
    return result


def overwrite(state: dict[str, Any]) -> None:
    """Change every value in place, as an optimizer would, and drop the references."""
    with torch.no_grad():
        for name, value in state.items():
            if name == "expanded":
                value[0:1, 0:1].fill_(99)
            elif isinstance(value, torch.Tensor):
                value.zero_()
    state["options"]["lr"] = 99
    state["options"]["names"][1]["b"] = 99
    state.clear()


def assert_holds(path: Path | str, value: float) -> None:
    """The checkpoint at ``path`` is ``every_kind(value)``, whole."""
    loaded = destination()
    dcp.load(loaded, checkpoint_id=path, no_dist=True)
    expected = every_kind(value)
    for name, wanted in expected.items():
        if isinstance(wanted, torch.Tensor):
            assert torch.equal(loaded[name], wanted.detach().resolve_conj()), name
        else:
            assert loaded[name] == wanted, name


def held_writer(
    path: Path, method: str = "write_columns"
) -> tuple[dcp.StorageWriter, threading.Event, threading.Event]:
    """A writer whose ``method`` waits; the events: it waits, let it go."""
    entered, released = threading.Event(), threading.Event()
    writer = faulty_writer(
        dcp.FileSystemWriter(path),
        [CallFault(method=method, hang=Hang(released, entered))],
        rank=0,
    )
    return writer, entered, released
