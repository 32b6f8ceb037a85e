"""Saves and loads where new tensors are made elsewhere: what the engine makes for itself lies in
the host's memory all the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp


def state(*, filled: bool) -> dict[str, Any]:
    tensor = torch.arange(30_000.0).reshape(100, 300)
    made = {
        "plain": tensor.clone(),
        "strided": tensor.clone().t(),
        "conjugate": torch.complex(tensor, tensor)[:50].conj().resolve_conj(),
        "empty": torch.empty(0, 3),
        "each": dcp.PerRank(tensor[:3].clone()),
    }
    if not filled:
        for value in made.values():
            (value.value if isinstance(value, dcp.PerRank) else value).zero_()
    # More than an object that lies in the manifest may hold.
    return {**made, "text": "x" * 10_000 if filled else ""}


@pytest.fixture
def somewhere_else() -> Iterator[None]:
    with torch.device("meta"):
        yield


@pytest.fixture
def states() -> tuple[dict[str, Any], dict[str, Any]]:
    return state(filled=True), state(filled=False)


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    each = [torch.equal(one[name], two[name]) for name in ("plain", "strided", "conjugate")]
    return (
        all(each)
        and torch.equal(one["each"].value, two["each"].value)
        and one["text"] == (two["text"])
    )


@pytest.mark.usefixtures("states", "somewhere_else")
def test_saved_and_loaded(tmp_path: Path, states: tuple[dict[str, Any], dict[str, Any]]) -> None:
    saved, loaded = states
    dcp.save(saved, checkpoint_id=tmp_path / "c")
    dcp.load(loaded, checkpoint_id=tmp_path / "c")
    assert same(saved, loaded)


@pytest.mark.usefixtures("states", "somewhere_else")
def test_saved_in_the_background(
    tmp_path: Path, states: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    saved, loaded = states
    dcp.async_save(saved, checkpoint_id=tmp_path / "c").result()
    dcp.load(loaded, checkpoint_id=tmp_path / "c")
    assert same(saved, loaded)


@pytest.mark.usefixtures("states", "somewhere_else")
def test_opened_and_verified(tmp_path: Path, states: tuple[dict[str, Any], dict[str, Any]]) -> None:
    saved, loaded = states
    dcp.save(saved, checkpoint_id=tmp_path / "c")
    with dcp.open(tmp_path / "c") as checkpoint:
        assert torch.equal(checkpoint["plain"][5:9], saved["plain"][5:9])
        assert torch.equal(checkpoint["plain"][:, ::7], saved["plain"][:, ::7])
        assert checkpoint["text"].load() == saved["text"]
    assert dcp.verify(tmp_path / "c").bytes_read > 120_000
    assert dcp.load(loaded, latest_in=tmp_path, verify="full").latest is not None
    assert same(saved, loaded)
