"""Encoded objects as one tensor."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.async_saver.object_blob import pack_objects, unpack_objects
from dcp_engine.format.object_codec import EncodedObject


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=3000), st.booleans()), max_size=20))
def test_they_come_back(drawn: list[tuple[bytes, bool]]) -> None:
    objects = {
        f"name {i}": EncodedObject(data, pickled=pickled) for i, (data, pickled) in enumerate(drawn)
    }
    names = sorted(objects, reverse=True)
    blob = pack_objects(names, objects)
    assert unpack_objects(names, blob.numpy().tobytes()) == objects


def test_a_little_more_takes_no_more_room() -> None:
    """Else tensors would move, and all would be sent to the worker again."""
    sizes = {
        len(pack_objects(["a"], {"a": EncodedObject(b"x" * n, pickled=False)}))
        for n in range(2000, 4000, 100)
    }
    assert sizes == {4096}
