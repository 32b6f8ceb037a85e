"""The alarm by version counters: what it sees, and what the documentation says that it misses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from dcp_engine.errors import StagingError
from dcp_engine.staging.versions import VersionAlarm


def step(tensor: torch.Tensor, *, fused: bool) -> None:
    assert isinstance(tensor, torch.nn.Parameter)
    optimizer = torch.optim.AdamW([tensor], lr=0.1, fused=fused)
    tensor.grad = torch.ones_like(tensor)
    optimizer.step()


def by_numpy(tensor: torch.Tensor) -> None:
    tensor.detach().numpy()[...] = 3.0


def by_code_of_its_own(tensor: torch.Tensor) -> None:
    ctypes.memset(tensor.data_ptr(), 1, 4)


def while_inferring(tensor: torch.Tensor) -> None:
    with torch.inference_mode():
        tensor.add_(1)


def changed(tensor: torch.Tensor, change: Callable[[torch.Tensor], object]) -> VersionAlarm:
    """The alarm, set before the change."""
    alarm = VersionAlarm([("w", tensor)])
    before = tensor.detach().clone()
    change(tensor)
    assert not torch.equal(before, tensor), "nothing was changed"
    return alarm


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.detach().add_(1),
        lambda w: w.detach()[2:3].fill_(9),
        lambda w: step(w, fused=False),
    ],
    ids=["in place", "through a view", "an optimizer"],
)
def test_what_it_sees(change: Callable[[torch.Tensor], object]) -> None:
    alarm = changed(torch.nn.Parameter(torch.ones(8)), change)
    with pytest.raises(StagingError, match="'w' changed"):
        alarm.check()


@pytest.mark.parametrize(
    "change",
    [
        lambda w: step(w, fused=True),
        lambda w: w.data.add_(1),
        by_numpy,
        by_code_of_its_own,
    ],
    ids=["fused optimizer", "data", "numpy", "custom kernel"],
)
def test_what_it_misses(change: Callable[[torch.Tensor], object]) -> None:
    changed(torch.nn.Parameter(torch.ones(8)), change).check()


def test_inference_tensors_have_no_counter() -> None:
    with torch.inference_mode():
        tensor = torch.ones(8)
    changed(tensor, while_inferring).check()
