"""Objects come back as they were, equal values are equal bytes, hostile bytes do nothing."""

from __future__ import annotations

import collections
import datetime
import enum
import math
import pathlib
import random
import struct
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.errors import (
    CheckpointError,
    DamagedCheckpointError,
    UnsafeContentError,
    UnsupportedStateError,
)
from dcp_engine.format.object_codec import decode_object, encode_object
from dcp_engine.format.tagged import MAX_DEPTH

SETTINGS = settings(max_examples=150, deadline=None)


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Level(enum.IntEnum):
    LOW = 1


class Mode(enum.Flag):
    A = 1
    B = 2


class Point(collections.namedtuple("Point", "x y")):
    pass


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    # Under import mode "importlib" a test module is not in sys.modules by its own name.
    if __name__ not in sys.modules:
        module = types.ModuleType(__name__)
        vars(module).update(globals())
        monkeypatch.setitem(sys.modules, __name__, module)


def round_trip(value: object, *, allow_pickle: bool = False) -> object:
    encoded = encode_object(value, fqn="key")
    return decode_object(encoded.data, encoded.pickled, fqn="key", allow_pickle=allow_pickle)


X87 = np.finfo(np.longdouble).nmant == 63
"""80 bits of a longdouble are the number, the rest is padding."""


def bits(value: np.ndarray | np.generic) -> bytes:
    if value.dtype != np.longdouble or not X87:
        return value.tobytes()
    return b"".join(value.tobytes()[i : i + 10] for i in range(0, value.nbytes, value.itemsize))


def same(one: object, other: object) -> bool:
    """Equality that also compares types, NaN bits, signs of zero and order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", other)
    if isinstance(one, complex) and isinstance(other, complex):
        return same(one.real, other.real) and same(one.imag, other.imag)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return (one.dtype, one.shape, bits(one)) == (other.dtype, other.shape, bits(other))
    if isinstance(one, np.generic) and isinstance(other, np.generic):
        return one.dtype == other.dtype and bits(one) == bits(other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return same(list(one.items()), list(other.items()))
    return one == other


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters(), max_size=20)
    | st.binary(max_size=20)
)
hashables = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=12)
        | st.lists(inner, max_size=12).map(tuple)
        | st.dictionaries(hashables, inner, max_size=6)
        | st.dictionaries(hashables, inner, max_size=6).map(collections.OrderedDict)
        | st.sets(hashables, max_size=6)
    ),
    max_leaves=15,
)


@SETTINGS
@given(values)
def test_plain_values_round_trip_without_pickle(value: object) -> None:
    encoded = encode_object(value, fqn="key")
    assert not encoded.pickled
    assert same(decode_object(encoded.data, False, fqn="key"), value)


UTC = datetime.UTC
NAT = np.frombuffer(bytes(7) + b"\x80", "<M8")[0]
"""``datetime64("NaT")``: no unit, which numpy 2.5 warns of where it is said."""
EXACT = [
    0, 127, 128, -128, -129, 1 << 63, -(1 << 63), 1 << 4000, float("nan"), float("inf"), -0.0,
    struct.unpack("<d", struct.pack("<Q", 0x7FF8000000000123))[0],
    complex(-0.0, math.nan), "", "\ud800 lone", "größe", b"", bytearray(b"abc"),
    [], (), set(), frozenset(), {}, list(range(100)), tuple(range(-4, 100)),
    [1.5] * 9, (math.nan,) * 8, [True] * 9, [1, True] * 8, [1, 1.0] * 8, [1 << 63] * 8,
    {1: "a", "1": "b", (1, 2): None, None: 0, 1.5: [], frozenset({1}): ()},
    collections.OrderedDict([("b", 1), ("a", 2)]),
    torch.Size([2, 3]), torch.Size([]), torch.float32, torch.bfloat16, torch.quint8,
    torch.device("cpu"), torch.device("cuda", 1), torch.device("meta"),
    np.float32(1.5), np.int64(-3), np.bool_(True), np.float64(-0.0), np.complex64(1j),
    np.str_("äö"), np.bytes_(b"ab"), np.datetime64("2026-11-21T00:00", "ns"), NAT,
    np.timedelta64(3, "D"), np.longdouble(1) / 3,
    np.arange(6, dtype=np.uint16).reshape(2, 3), np.zeros((0, 3)), np.array(5.0),
    np.arange(4, dtype=">i4"), np.array(["a", "bcd"]), np.array([True, False]),
    datetime.datetime(2026, 11, 21, 1, 2, 3, 456789, fold=1),
    datetime.datetime(2026, 1, 1, tzinfo=UTC),
    datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(seconds=-9007))),
    datetime.date(1, 1, 1), datetime.time(23, 59, 59, 999999, tzinfo=UTC),
    datetime.timedelta.min, datetime.timedelta.max, range(3, -9, -2),
    pathlib.Path("a/../b"), pathlib.PurePosixPath("/x"), pathlib.PureWindowsPath(r"C:\x"),
    random.Random(0).getstate(), np.random.RandomState(0).get_state(),
    np.random.default_rng(0).bit_generator.state,
]  # fmt: skip


@pytest.mark.parametrize("value", EXACT, ids=lambda value: repr(value)[:40])
def test_types_with_an_encoding_come_back_exactly(value: object) -> None:
    encoded = encode_object(value, fqn="key")
    assert not encoded.pickled
    assert same(decode_object(encoded.data, False, fqn="key"), value)


@pytest.mark.skipif(not X87, reason="a longdouble of this machine has no padding")
@pytest.mark.parametrize("dtype", [np.longdouble, np.clongdouble])
@pytest.mark.parametrize("order", "<>")
def test_padding_is_not_stored(dtype: type[np.generic], order: str) -> None:
    parts = 2 if dtype is np.clongdouble else 1
    number = (np.longdouble(1) / 3).tobytes()[:10]
    size = np.dtype(np.longdouble).itemsize

    def array(padding: bytes) -> np.ndarray:
        raw = (number + padding.ljust(size - 10, padding)) * 3 * parts
        return np.frombuffer(
            raw[::-1] if order == ">" else raw, np.dtype(dtype).newbyteorder(order)
        )

    zeros, secret = array(b"\0"), array(b"s")
    assert (zeros == secret).all()
    encoded = encode_object(secret, fqn="key")
    assert encoded == encode_object(zeros, fqn="key")
    assert b"ss" not in encoded.data
    decoded = decode_object(encoded.data, False, fqn="key")
    assert isinstance(decoded, np.ndarray)
    assert decoded.dtype == secret.dtype
    assert (decoded == secret).all()
    if order == "<":
        assert encode_object(secret[0], fqn="k") == encode_object(zeros[0], fqn="k")


def test_enum_members_are_stored_by_name() -> None:
    for member in (Color.BLUE, Level.LOW, Mode.B, [Color.RED] * 9):
        encoded = encode_object(member, fqn="key")
        assert not encoded.pickled
        decoded = decode_object(encoded.data, False, fqn="key")
        assert decoded == member
        assert type(decoded) is type(member)
    assert decode_object(encode_object(Color.RED, fqn="k").data, False, fqn="k") is Color.RED


def test_an_enum_of_a_module_that_is_not_imported_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = types.ModuleType("not_imported_yet")
    kind = enum.Enum("Kind", "ONE", module="not_imported_yet")
    module.Kind = kind
    monkeypatch.setitem(sys.modules, "not_imported_yet", module)
    encoded = encode_object(kind.ONE, fqn="key")
    monkeypatch.delitem(sys.modules, "not_imported_yet")
    with pytest.raises(UnsafeContentError, match="Import not_imported_yet") as caught:
        decode_object(encoded.data, False, fqn="key")
    assert caught.value.kind == "import_refused"


def test_decoding_an_enum_calls_no_module_getattr(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("trap")
    called: list[str] = []
    module.__getattr__ = called.append  # type: ignore[method-assign, assignment]
    monkeypatch.setitem(sys.modules, "trap", module)
    data = b"\x01E\x04trap\x04Kind\x03ONE"
    with pytest.raises(DamagedCheckpointError, match="there is no"):
        decode_object(data, False, fqn="key")
    assert not called


@pytest.mark.parametrize("target", ["dict", "path.join", "__dict__", ""])
def test_an_enum_can_only_be_an_enum(target: str) -> None:
    data = b"\x01E\x02os" + bytes([len(target)]) + target.encode() + b"\x03get"
    with pytest.raises(DamagedCheckpointError):
        decode_object(data, False, fqn="key")


PICKLED = [
    Point(1, 2),
    Mode.A | Mode.B,
    collections.defaultdict(list, a=[1]),
    collections.Counter("abc"),
    torch.ones(2),
    np.array([1, "a"], dtype=object),
    np.zeros(2, dtype=[("a", "i4")]),
    datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(0), "named")),
    slice(1, 2),
]


@pytest.mark.parametrize("value", PICKLED, ids=lambda value: repr(value)[:40])
def test_everything_else_is_marked_as_pickle_and_comes_back(value: object) -> None:
    encoded = encode_object({"a": [value]}, fqn="key")
    assert encoded.pickled
    decoded = decode_object(encoded.data, True, fqn="key", allow_pickle=True)
    assert isinstance(decoded, dict)
    restored = decoded["a"][0]
    assert type(restored) is type(value)
    assert repr(restored) == repr(value)


def test_a_pickle_of_tensors_needs_no_permission() -> None:
    encoded = encode_object([torch.arange(3)], fqn="key")
    decoded = decode_object(encoded.data, True, fqn="key")
    assert isinstance(decoded, list)
    assert torch.equal(decoded[0], torch.arange(3))


class Attack:
    ran = False

    def __reduce__(self) -> tuple[object, ...]:
        return (setattr, (Attack, "ran", True))


def test_a_pickle_does_not_run_unless_allowed() -> None:
    encoded = encode_object(Attack(), fqn="key")
    with pytest.raises(UnsafeContentError) as caught:
        decode_object(encoded.data, True, fqn="optimizer.thing", checkpoint="step-1")
    assert caught.value.kind == "pickle_refused"
    assert caught.value.tensor == "optimizer.thing"
    assert caught.value.checkpoint == "step-1"
    assert not Attack.ran
    decode_object(encoded.data, True, fqn="key", allow_pickle=True)
    assert Attack.ran
    Attack.ran = False


def test_what_cannot_be_pickled_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedStateError, match=r"lambda|function") as caught:
        encode_object(lambda: None, fqn="model.hook")
    assert caught.value.tensor == "model.hook"


def test_what_holds_itself_or_is_too_deep_is_pickled() -> None:
    cycle: list[object] = []
    cycle.append(cycle)
    encoded = encode_object(cycle, fqn="key")
    assert encoded.pickled
    deep: object = 0
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    assert encode_object(deep, fqn="key").pickled
    assert not encode_object(deep[0], fqn="key").pickled  # type: ignore[index]


def test_sets_of_one_content_are_one_encoding() -> None:
    words = [f"word{i}" for i in range(50)]
    shuffled = words[::-1]
    assert encode_object(set(words), fqn="k").data == encode_object(set(shuffled), fqn="k").data


def test_a_thousand_parameters_are_packed() -> None:
    encoded = encode_object(list(range(1000)), fqn="key")
    assert len(encoded.data) < 8 * 1000 + 10


BAD = {
    "empty": b"",
    "version": b"\x02N",
    "tag": b"\x01\xff",
    "left over": b"\x01NN",
    "short string": b"\x01s\x05ab",
    "huge count": b"\x01l\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    "endless varint": b"\x01l" + b"\xff" * 20,
    "padded varint": b"\x01s\x80\x00",
    "depth": b"\x01" + b"l\x01" * 100000 + b"N",
    "list in set": b"\x01e\x01l\x00",
    "twice in set": b"\x01e\x02NN",
    "key twice": b"\x01m\x02NTNF",
    "month 13": b"\x01O\xd0\x07\x0d\x01",
    "bad UTF-8": b"\x01s\x01\xff",
    "no dtype": b"\x01y\x03foo",
    "dtype is a function": b"\x01y\x04load",
    "no device": b"\x01v\x03foo",
    "object array": b"\x01a\x02|O\x01\x01" + bytes(8),
    "record array": b"\x01a\x05f4,f4\x01\x01" + bytes(8),
    "huge array": b"\x01a\x03<f4\x02" + b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f" * 2,
    "huge empty array": b"\x01a\x03<f4\x02\x00" + b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    "array without bytes": b"\x01a\x03<f4\x01\x04",
    "bool of 2": b"\x01a\x03|b1\x01\x01\x02",
    "many dimensions": b"\x01a\x03<f4" + b"\x41" + b"\x01" * 65 + bytes(4),
    "scalar with dimensions": b"\x01g\x03<f4\x01\x01" + bytes(4),
    "range without step": b"\x01r" + bytes(24),
    "zone of a year": b"\x01A\xd0\x07\x01\x01\x00\x00\x00" + bytes(5) + b"Z" + b"\x01" * 24,
    "no zone": b"\x01A\xd0\x07\x01\x01\x00\x00\x00" + bytes(5) + b"Q",
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_invalid_encodings_are_refused(data: bytes) -> None:
    with pytest.raises(DamagedCheckpointError) as caught:
        decode_object(data, False, fqn="key", checkpoint="step-1")
    assert caught.value.kind == "object_invalid"
    assert caught.value.tensor == "key"


@SETTINGS
@given(values, st.data())
def test_mutations_give_values_or_errors(value: object, data: st.DataObject) -> None:
    encoded = bytearray(encode_object([value, torch.float32, np.ones(2)], fqn="key").data)
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(encoded)))
    for candidate in (bytes(encoded), bytes(encoded[:cut])):
        try:
            decode_object(candidate, False, fqn="key")
        except CheckpointError as error:
            assert error.kind in ("object_invalid", "import_refused")


@SETTINGS
@given(st.binary(max_size=60))
def test_random_bytes_give_values_or_errors(data: bytes) -> None:
    try:
        decode_object(b"\x01" + data, False, fqn="key")
    except CheckpointError as error:
        assert error.kind in ("object_invalid", "import_refused")


@pytest.mark.parametrize("cut", [0, 1, 50, -1])
def test_a_damaged_pickle_is_damage(cut: int) -> None:
    data = encode_object(torch.ones(3), fqn="key").data[:cut]
    with pytest.raises(CheckpointError) as caught:
        decode_object(data, True, fqn="key")
    assert caught.value.kind in ("object_invalid", "pickle_refused")
