"""What is said of a pickle that is not executed."""

from __future__ import annotations

import io
import pickle
import sys
import types

import pytest
import torch

from dcp_engine.errors import CheckpointError, UnsafeContentError
from dcp_engine.format.object_codec import decode_object, encode_object
from dcp_engine.planning.item_bytes import read_item_bytes


@pytest.mark.parametrize("items", [False, True])
def test_a_refused_pickle_is_said_to_need_its_class(items: bool) -> None:
    """Who allows the class need not allow the rest."""
    value = types.SimpleNamespace(lr=0.1)
    data = encode_object(value, fqn="key").data

    def decode() -> object:
        if items:
            return read_item_bytes(io.BytesIO(data), fqn="key")
        return decode_object(data, True, fqn="key")

    with pytest.raises(UnsafeContentError) as caught:
        decode()
    assert caught.value.message.endswith("would run code: it needs types.SimpleNamespace")
    hint = str(caught.value.hint)
    assert "torch.serialization.safe_globals([types.SimpleNamespace])" in hint
    assert "allow_pickle=True" in hint
    assert hint.endswith("DefaultLoadPlanner(allow_pickle=True)") is items
    with torch.serialization.safe_globals([types.SimpleNamespace]):
        assert decode() == value


@pytest.mark.parametrize(
    ("data", "reason"),
    [(pickle.dumps(sys.exit, 2), "GLOBAL sys.exit whose module sys"), (b"\x80\x02J", "")],
    ids=["a blocked module", "cut off"],
)
def test_another_reason_is_said_in_one_line(data: bytes, reason: str) -> None:
    """There is no class that could be allowed."""
    with pytest.raises(CheckpointError) as caught:
        decode_object(data, True, fqn="key")
    assert reason in caught.value.message and caught.value.message.isprintable()
    assert "Weights only" not in caught.value.message
    assert "safe_globals" not in str(caught.value.hint)
