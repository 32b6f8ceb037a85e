"""Asynchronous saves over other stores and groups, of FSDP2 models, many times, and failing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.multirank import async_place_cases as cases
from tests.torch_features import CPU_FSDP

pytestmark = pytest.mark.multirank

MIB = 1 << 20


def test_two_groups_over_a_file_store(ranks: Any, tmp_path: Path) -> None:
    found = ranks.run(
        2, cases.save_over_a_file_store, str(tmp_path / "c"), str(tmp_path), timeout=150
    )
    for of_rank in found:
        assert of_rank["whole"] == [True, True]
        assert len(of_rank["workers"]) == 3, "each engine has a worker of its own"
        assert None not in of_rank["workers"]
        assert of_rank["killed"]["failed"] == [1]
        assert "SIGKILL" in of_rank["killed"]["text"]
        assert of_rank["after"] == [True, True]


def test_a_hash_store_of_one_rank(ranks: Any, tmp_path: Path) -> None:
    [found] = ranks.run(1, cases.save_over_a_hash_store, str(tmp_path / "c"), timeout=90)
    assert found == {"whole": True, "planner": ["gloo", "0", "1"]}


@pytest.mark.parametrize(
    "thorough", [False, pytest.param(True, marks=pytest.mark.torture)], ids=["sample", "all"]
)
def test_every_method_fails_in_the_worker(ranks: Any, tmp_path: Path, thorough: bool) -> None:
    path = str(tmp_path / "c")
    for found in ranks.run(2, cases.fail_everywhere, path, thorough=thorough, timeout=200):
        *failed, last = found
        for case in failed:
            assert case["failed"] == [case["victim"]], case
            assert case["method"].split()[1] in case["text"], case
            assert case["old"], case
            assert case["same worker"], case
        assert last == {"new": True, "left": 1}


def test_a_failure_before_the_worker_begins_is_told(ranks: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    for found in ranks.run(2, cases.fail_before_the_worker_begins, path, timeout=120):
        for victim, case in enumerate(found):
            assert case["failed"] == [victim], case
            assert "far from home" in case["text"], "not that a rank is missing"
            assert case["old"]
            assert case["new"]


@pytest.mark.skipif(not CPU_FSDP, reason="this torch's FSDP2 does not train on CPU")
@pytest.mark.parametrize("kind", ["thread", pytest.param("process", marks=pytest.mark.torture)])
def test_background_staging_behind_fused_steps(ranks: Any, tmp_path: Path, kind: str) -> None:
    for found in ranks.run(
        2, cases.stage_behind_fused_steps, str(tmp_path / "c"), kind, timeout=90
    ):
        assert found["with"] == [True, True, True], "the state at the call, bit for bit"
        assert found["without"] in ("torn", "staging_torn"), "else this test shows nothing"


@pytest.mark.torture
@pytest.mark.parametrize("kind", ["thread", "process"])
def test_200_saves_of_two_ranks(ranks: Any, tmp_path: Path, kind: str) -> None:
    found = ranks.run(
        2, cases.save_often, str(tmp_path / "c"), kind, 200, 81, timeout=280, real_workers=True
    )
    for early, late in found:
        assert late["keys"] == early["keys"], "of 118 saves, 39 of them failed"
        assert len(early["of"]) == (2 if kind == "process" else 1)
        for before, after in zip(early["of"], late["of"], strict=True):
            assert after["descriptors"] <= before["descriptors"]
            assert after["threads"] <= before["threads"]
            assert after["own"] - before["own"] < 4 * MIB
    assert os.listdir(tmp_path) == ["c"]
