"""``PerRank`` is a plain, frozen, picklable mark."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from dcp_engine.state.per_rank import PerRank


def test_it_survives_pickling_and_compares_by_value() -> None:
    value = PerRank({"a": 1})
    assert pickle.loads(pickle.dumps(value)) == value
    assert repr(PerRank(3)) == "PerRank(value=3)"


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PerRank(1).value = 2  # type: ignore[misc]
