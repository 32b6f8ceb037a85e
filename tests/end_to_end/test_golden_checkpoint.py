"""The golden checkpoint, put together without the engine's writer, through the engine's reader."""

from __future__ import annotations

import pathlib
from typing import Any

import torch

import dcp_engine as dcp
from tests.golden.regenerate import SAVE_ID, tensors

CHECKPOINT = pathlib.Path(__file__).resolve().parents[1] / "golden" / "v1" / "checkpoint"


def test_it_loads_on_one_rank() -> None:
    expected = tensors()
    state: dict[str, Any] = {
        "model": {
            "weight": torch.zeros(8, 50),
            "bias": torch.zeros(50, dtype=torch.bfloat16),
            "tied": torch.zeros(8, 50),
        },
        "phase": torch.zeros(2, dtype=torch.complex128),
        "step": torch.tensor(0),
        "rng": dcp.PerRank(torch.zeros(0, dtype=torch.uint8)),
        "lr": None,
        "big": None,
        "seed": dcp.PerRank(None),
    }
    report = dcp.load(
        state, storage_reader=dcp.FileSystemReader(CHECKPOINT), no_dist=True, per_rank="list"
    )
    assert report.save_id == SAVE_ID
    assert (report.missing, report.unexpected) == ((), ())
    for name in ("weight", "bias"):
        assert torch.equal(state["model"][name], expected[f"model.{name}"])
    assert torch.equal(state["model"]["tied"], expected["model.weight"])
    assert torch.equal(state["phase"], expected["phase"])
    assert torch.equal(state["step"], expected["step"])
    assert (state["lr"], state["big"]) == (0.1, list(range(100)))
    seeds, rngs = state["seed"], state["rng"]
    assert (seeds.value if isinstance(seeds, dcp.PerRank) else seeds) == [0, 1]
    rngs = rngs.value if isinstance(rngs, dcp.PerRank) else rngs
    assert [torch.equal(rng, expected[f"rng/{rank}"]) for rank, rng in enumerate(rngs)] == [
        True
    ] * 2


def test_it_opens_by_name() -> None:
    with dcp.Checkpoint(dcp.FileSystemReader(CHECKPOINT), CHECKPOINT) as ckpt:
        weight = ckpt["model.weight"]
        assert isinstance(weight, dcp.LazyTensor)
        assert torch.equal(weight[3:6, ::2], tensors()["model.weight"][3:6, ::2])
