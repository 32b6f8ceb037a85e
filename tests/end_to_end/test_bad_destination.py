"""A state dict that does not fit the checkpoint: refused by key, before a byte has moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from tests.end_to_end.checkpoints import Refusal, load, refused, save, snapshot, state


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save(tmp_path / "c", {**state(), "own": dcp.PerRank({"seed": 5, "rng": torch.arange(3)})})
    return tmp_path / "c"


def mismatch(kind: str, tensor: str) -> Refusal:
    return Refusal(error=dcp.StateMismatchError, kind=kind, tensor=tensor)


def unfit(tensor: str) -> Refusal:
    return Refusal(error=dcp.UnsupportedStateError, kind="unsupported_state", tensor=tensor)


WEIGHT = "model.weight"

CASES: dict[str, tuple[dict[str, Any], Refusal]] = {
    "another shape": (
        {"model": {"weight": torch.zeros(6, 4)}},
        mismatch("shape_mismatch", WEIGHT),
    ),
    "more dimensions": (
        {"model": {"weight": torch.zeros(1, 4, 6)}},
        mismatch("shape_mismatch", WEIGHT),
    ),
    "a part of it": ({"model": {"weight": torch.zeros(3, 6)}}, mismatch("shape_mismatch", WEIGHT)),
    "as many elements": (
        {"model": {"weight": torch.zeros(24)}},
        mismatch("shape_mismatch", WEIGHT),
    ),
    "a 0-d tensor": (
        {"model": {"half": torch.zeros(())}},
        mismatch("shape_mismatch", "model.half"),
    ),
    "a narrower dtype": (
        {"model": {"weight": torch.zeros(4, 6, dtype=torch.bfloat16)}},
        mismatch("dtype_mismatch", WEIGHT),
    ),
    "a wider dtype": (
        {"model": {"half": torch.zeros(5)}},
        mismatch("dtype_mismatch", "model.half"),
    ),
    "a dtype of the same size": (
        {"model": {"weight": torch.zeros(4, 6, dtype=torch.int32)}},
        mismatch("dtype_mismatch", WEIGHT),
    ),
    "a missing tensor": ({"nowhere": torch.zeros(2)}, mismatch("missing_key", "nowhere")),
    "a missing object": ({"model": {"epoch": 3}}, mismatch("missing_key", "model.epoch")),
    "an object for a tensor": ({"large": "text"}, mismatch("type_mismatch", "large")),
    "None for a tensor": ({"large": None}, mismatch("type_mismatch", "large")),
    "a tensor for an object": ({"step": torch.zeros(())}, mismatch("type_mismatch", "step")),
    "a whole dict's name for an object": ({"model": 3}, mismatch("missing_key", "model")),
    "an expanded tensor": (
        {"model": {"weight": torch.zeros(1, 6).expand(4, 6)}},
        unfit(WEIGHT),
    ),
    "overlapping windows": (
        {"model": {"weight": torch.zeros(9).as_strided((4, 6), (1, 1))}},
        unfit(WEIGHT),
    ),
    "a sparse tensor": ({"model": {"weight": torch.zeros(4, 6).to_sparse()}}, unfit(WEIGHT)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_destination_that_is(root: Path, name: str) -> None:
    into, expected = CASES[name]
    # What does fit must not be filled either.
    into = {**into, "blob": "before"}
    before = snapshot(root)
    refused(lambda: load(root, into), expected, root)
    assert into["blob"] == "before"
    assert snapshot(root) == before


def test_what_is_wrong_is_said_with_both_sides(root: Path) -> None:
    text = refused(
        lambda: load(root, {"model": {"weight": torch.zeros(6, 4)}}),
        mismatch("shape_mismatch", WEIGHT),
        root,
    )
    assert "[6, 4]" in text and "[4, 6]" in text
    text = refused(
        lambda: load(root, {"large": torch.zeros(40_000, dtype=torch.float64)}),
        mismatch("dtype_mismatch", "large"),
        root,
    )
    assert "float64" in text and "float32" in text


def test_destinations_that_fit_in_their_own_way(root: Path) -> None:
    """Strides, views and parts of larger memory are no reason to refuse."""
    around = torch.full((8, 12), -1.0)
    inner = around[2:6, 3:9]
    turned = torch.full((6, 4), -1.0).t()
    into = {"model": {"weight": inner, "tied": turned}}
    load(root, into)
    expected = state()["model"]["weight"]
    assert torch.equal(inner, expected) and torch.equal(turned, expected)
    assert float(around.sum()) == float(expected.sum()) - (8 * 12 - 24)


def test_a_partial_load_reports_what_was_missing(root: Path) -> None:
    into = {"large": torch.zeros(40_000), "new": torch.full((2,), 7.0), "epoch": 3}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    report = dcp.load(
        into, storage_reader=dcp.FileSystemReader(root), planner=planner, no_dist=True
    )
    assert sorted(report.missing) == ["epoch", "new"]
    assert WEIGHT in report.unexpected and "step" in report.unexpected
    assert into["epoch"] == 3 and bool((into["new"] == 7.0).all())
    assert float(into["large"][0]) == 1.0


def test_a_partial_load_still_refuses_what_does_not_fit(root: Path) -> None:
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    refused(
        lambda: dcp.load(
            {"large": torch.zeros(3)},
            storage_reader=dcp.FileSystemReader(root),
            planner=planner,
            no_dist=True,
        ),
        mismatch("shape_mismatch", "large"),
        root,
    )


def test_per_rank_values_come_back(root: Path) -> None:
    into = {"own": dcp.PerRank({"seed": 0, "rng": torch.zeros(3, dtype=torch.int64)})}
    load(root, into)
    assert into["own"].value["seed"] == 5
    assert into["own"].value["rng"].tolist() == [0, 1, 2]


class ByItems(dcp.DefaultLoadPlanner):
    """The default planner in DCP's life cycle."""

    def finish_plan(self, central_plan: dcp.LoadPlan) -> dcp.LoadPlan:
        return central_plan


def missing(tmp_path: Path, saved: dict[str, Any], into: dict[str, Any], planner: Any) -> str:
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(into, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    assert caught.value.kind == "missing_key"
    return str(caught.value)


@pytest.mark.parametrize("planner", [dcp.DefaultLoadPlanner, ByItems])
def test_an_empty_container_for_stored_values_is_called_that(tmp_path: Path, planner: Any) -> None:
    saved = {"o": {"state": {0: torch.ones(2), 1: 3}, "state_of": 1}}
    text = missing(tmp_path, saved, {"o": {"state": {}}}, planner())
    assert "'o.state'" in text
    assert "2 values below it; the destination is an empty dict" in text
    assert "Fill the destination first" in text and "get_state_dict" in text
    assert "allow_partial_load" not in text


@pytest.mark.parametrize("planner", [dcp.DefaultLoadPlanner, ByItems])
@pytest.mark.parametrize("value", [5, torch.ones(2)], ids=["object", "tensor"])
def test_one_value_for_many_is_called_that(tmp_path: Path, planner: Any, value: Any) -> None:
    text = missing(tmp_path / "a", {"a": {"x": 1, "y": 2}}, {"a": value}, planner())
    named = "a tensor" if isinstance(value, torch.Tensor) else "one value of type int"
    assert f"2 values below it; the destination is {named}" in text
    text = missing(tmp_path / "b", {"a": value}, {"a": {"b": {"x": value}}}, planner())
    assert "but one value 'a'; the destination has a container in its place" in text
    assert "allow_partial_load" not in text
