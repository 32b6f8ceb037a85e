"""The stagers of DCP's names, and the optimizer hook."""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from dcp_engine.errors import StagingError, UnsupportedStateError, UsageError
from dcp_engine.staging.hooks import install_staging_hook
from dcp_engine.staging.stagers import (
    AsyncStager,
    BlockingAsyncStager,
    DefaultStager,
    StagingOptions,
)
from tests.staging.states import Opaque, numbered


def test_the_protocol() -> None:
    class Mine(AsyncStager):
        def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            return state_dict

    class Unfinished(AsyncStager):
        _synchronize_after_execute = False

    for stager in (Mine(), DefaultStager(), BlockingAsyncStager()):
        assert isinstance(stager, AsyncStager)
        stager.synchronize_staging()
        stager.close()
    assert Mine().should_synchronize_after_execute
    assert not Unfinished().should_synchronize_after_execute
    assert not BlockingAsyncStager().should_synchronize_after_execute
    with pytest.raises(NotImplementedError, match="Unfinished"):
        Unfinished().stage({})


def test_the_options_are_dcps() -> None:
    options = StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=False,
    )
    with DefaultStager(options) as stager:
        assert stager.config is options
    assert not StagingOptions().use_async_staging


def test_blocking_is_the_default_and_whole() -> None:
    state = {"w": numbered(5), "n": {"lr": 0.1}}
    with DefaultStager() as stager:
        staged = stager.stage(state)
        assert isinstance(staged, dict)
        state["w"].zero_()
        state["n"]["lr"] = 3
        assert staged["w"].tolist() == [0, 1, 2, 3, 4]
        assert staged["n"] == {"lr": 0.1}
        stager.synchronize_staging()


def test_staging_in_the_background() -> None:
    with DefaultStager(StagingOptions(use_async_staging=True)) as stager:
        for turn in range(3):
            state = {"w": numbered(5) + turn}
            future = stager.stage(state)
            assert isinstance(future, Future)
            stager.synchronize_staging()
            state["w"].zero_()
            assert future.result(60)["w"][0] == turn


def test_failures_in_the_background_are_in_the_future() -> None:
    def check() -> None:
        raise StagingError("torn", kind="staging_torn")

    with DefaultStager(StagingOptions(use_async_staging=True)) as stager:
        future = stager.stage({"w": numbered(5)}, check=check)
        with pytest.raises(StagingError, match="torn"):
            stager.synchronize_staging()
        assert isinstance(future.exception(60), StagingError)
        assert stager.stage({"w": numbered(5)}).result(60)["w"][1] == 1


def test_the_default_stager_reuses_its_memory() -> None:
    with DefaultStager() as stager:
        first = stager.stage({"w": numbered(5)})
        second = stager.stage({"w": numbered(5) + 1})
        assert first["w"].data_ptr() == second["w"].data_ptr()
    assert second["w"].tolist() == [1, 2, 3, 4, 5]  # valid after close


def test_warmup_sizes_and_touches() -> None:
    state = {"w": numbered(1_000_000), "o": [1]}
    with DefaultStager() as stager:
        stager.warmup(state)
        present = stager.arenas.present()
        assert present >= 4_000_000
        stager.stage(state)
        assert stager.arenas.present() == present


def test_the_blocking_stager_takes_fresh_memory_and_keeps_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    stager = BlockingAsyncStager()
    first = stager.stage({"w": numbered(5)})
    second = stager.stage({"w": numbered(5) + 1})
    assert (first["w"].tolist(), second["w"].tolist()) == ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5])
    assert len(os.listdir("/proc/self/fd")) == before
    stager.close()


def test_the_blocking_stager_can_keep_its_memory() -> None:
    stager = BlockingAsyncStager(cache_staged_state_dict=True)
    places = {stager.stage({"w": numbered(5)})["w"].data_ptr() for _ in range(3)}
    assert len(places) == 1
    stager.close()
    stager.close()


def test_type_check() -> None:
    stager = BlockingAsyncStager(type_check=True)
    assert stager.stage({"a": numbered(1), "b": [{"c": 1, "d": None}]})["b"] == [
        {"c": 1, "d": None}
    ]
    with pytest.raises(UnsupportedStateError, match="Opaque") as info:
        stager.stage({"b": {"o": Opaque()}})
    assert info.value.tensor == "b.o"


def test_closed_stagers_refuse() -> None:
    stager = DefaultStager()
    stager.close()
    stager.close()
    with pytest.raises(UsageError, match="closed"):
        stager.stage({"w": numbered(1)})


@pytest.mark.parametrize("fused", [False, True])
def test_the_hook_runs_before_the_first_write(fused: bool) -> None:
    parameter = torch.nn.Parameter(numbered(4))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    seen: list[list[float]] = []

    def writes_too(*_: Any) -> None:
        parameter.data.add_(100)

    other = optimizer.register_step_pre_hook(writes_too)
    handle = install_staging_hook(optimizer, lambda: seen.append(parameter.tolist()))
    parameter.grad = torch.ones(4)
    optimizer.step()
    assert seen == [[0, 1, 2, 3]]
    assert parameter.tolist() != [0, 1, 2, 3]
    handle.remove()
    other.remove()
    optimizer.step()
    assert len(seen) == 1


def test_the_hook_makes_background_staging_whole() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(50, 50)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with DefaultStager(StagingOptions(use_async_staging=True), arenas=2) as stager:
        staged: list[Any] = []
        install_staging_hook(optimizer, lambda: [s.wait() for s in staged])
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            before = {name: value.clone() for name, value in model.state_dict().items()}
            staged = [stager.begin({"model": model, "optimizer": optimizer})]
            optimizer.step()
            for name, value in before.items():
                assert torch.equal(staged[0].state_dict["model"][name], value)
            staged[0].release()


def test_what_waiting_raises_step_raises() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(numbered(1))])

    def wait() -> None:
        raise StagingError("torn", kind="staging_torn")

    install_staging_hook(optimizer, wait)
    with pytest.raises(StagingError, match="torn"):
        optimizer.step()
