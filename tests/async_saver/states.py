"""State dicts for asynchronous saves, a writer that can be held up, and what a load gives back."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dcp_engine as dcp
from storage_backends.testing.faulty import Hang
from storage_backends.testing.faulty_calls import CallFault, faulty_writer


def every_kind(value: float = 1.0) -> dict[str, Any]:
    """Tensors in every memory layout that a CPU has, of every owner of memory, and objects."""
    value = float(value)
    complex_values = torch.full((3,), complex(value, 1), dtype=torch.complex64)
    tied, overlapped = torch.full((4,), value), torch.arange(8, dtype=torch.int64) + int(value)
    with torch.inference_mode():
        inference = torch.full((3,), value)
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
        "float8": torch.full((5,), value).to(torch.float8_e4m3fn),
        "unsigned": torch.full((3,), int(value), dtype=torch.uint16),
        "complex": complex_values,
        "conjugate": complex_values.clone().conj(),
        "negative": complex_values.clone().conj().imag,
        "channels last": (base.clone().reshape(1, 3, 4, 5) + 0).contiguous(
            memory_format=torch.channels_last
        ),
        "tied": tied,
        "tied too": tied,
        "first part": overlapped[:5],
        "second part": overlapped[3:],
        "numpy": torch.from_numpy(np.full(6, value)),
        "inference": inference,
        "history": torch.full((2,), value, requires_grad=True) * 1,
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
    """Change every value in place and free its memory, as FSDP frees the shards it has gathered,
    then drop the references."""
    for value in state.values():
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storage.fill_(0x99)
            if storage.resizable():
                storage.resize_(0)
    state["options"]["lr"] = 99
    state["options"]["names"][1]["b"] = 99
    state.clear()


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Its values: some dtypes have no comparison."""
    values = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten()
    return values.view(torch.uint8).numpy().tobytes()


def assert_holds(path: Path | str, value: float) -> None:
    """The checkpoint at ``path`` is ``every_kind(value)``, whole."""
    loaded = destination()
    dcp.load(loaded, checkpoint_id=path, no_dist=True)
    expected = every_kind(value)
    for name, wanted in expected.items():
        if isinstance(wanted, torch.Tensor):
            assert (loaded[name].dtype, loaded[name].shape) == (wanted.dtype, wanted.shape)
            assert bytes_of(loaded[name]) == bytes_of(wanted), name
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
