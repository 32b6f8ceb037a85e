"""Stagers that are not the engine's: what they hand out may be overwritten by their next copy."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dcp_engine as dcp
from tests.async_saver.states import held_writer

LIMIT = 60


class Derived(dcp.DefaultStager):
    """Uses ``stage``, as everything but the engine does."""


def kept() -> dcp.AsyncStager:
    return dcp.BlockingAsyncStager(cache_staged_state_dict=True)


def state_of(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((1000,), float(value))}


def stored(path: Path) -> list[float]:
    into = state_of(-1.0)
    dcp.load(into, checkpoint_id=path, no_dist=True)
    return into["w"].unique().tolist()


@pytest.mark.parametrize("kind", dcp.AsyncCheckpointerType)
@pytest.mark.parametrize("make", [kept, Derived])
def test_saves_behind_each_other_hold_their_own_values(
    tmp_path: Path, kind: dcp.AsyncCheckpointerType, make: Callable[[], dcp.AsyncStager]
) -> None:
    stager = make()
    with dcp.Engine(max_pending=2) as engine:
        for turn in range(4):
            engine.async_save(
                state_of(turn),
                checkpoint_id=tmp_path / f"{turn}",
                async_stager=stager,
                async_checkpointer_type=kind,
            )
    stager.close()
    assert [stored(tmp_path / f"{turn}") for turn in range(4)] == [[0], [1], [2], [3]]


@pytest.mark.parametrize(
    ("max_pending", "same", "waits"),
    [(1, True, True), (1, False, True), (2, True, True), (2, False, False)],
)
def test_the_next_copy_waits(tmp_path: Path, max_pending: int, same: bool, waits: bool) -> None:
    stager = kept()
    another = stager if same else kept()
    writer, entered, released = held_writer(tmp_path / "a")
    with dcp.Engine(max_pending=max_pending) as engine:
        first = engine.async_save(state_of(1), storage_writer=writer, async_stager=stager)
        assert entered.wait(LIMIT)

        def save() -> None:
            engine.async_save(state_of(2), checkpoint_id=tmp_path / "b", async_stager=another)

        caller = threading.Thread(target=save)
        caller.start()
        caller.join(0.3 if waits else LIMIT)
        waited, was_over = caller.is_alive(), first.done()
        released.set()
        caller.join(LIMIT)
    assert (waited, was_over) == (waits, False)
    for used in (stager, another):
        used.close()
    assert stored(tmp_path / "a") == [1]
    assert stored(tmp_path / "b") == [2]


def test_the_wait_for_the_copy_before_has_a_deadline(tmp_path: Path) -> None:
    stager = kept()
    writer, entered, released = held_writer(tmp_path / "a")
    with dcp.Engine() as engine:
        first = engine.async_save(state_of(1), storage_writer=writer, async_stager=stager)
        assert entered.wait(LIMIT)
        try:
            with pytest.raises(dcp.CoordinationError, match="max_pending") as caught:
                engine.async_save(
                    state_of(2), checkpoint_id=tmp_path / "b", async_stager=stager, timeout=0.2
                )
        finally:
            released.set()
        assert caught.value.kind == "timeout"
        first.result(LIMIT)
        engine.async_save(state_of(3), checkpoint_id=tmp_path / "b", async_stager=stager)
    stager.close()
    assert stored(tmp_path / "a") == [1]
    assert stored(tmp_path / "b") == [3]
