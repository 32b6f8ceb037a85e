"""File names can only be what the format describes, and dtype codes never move."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.errors import CheckpointError, DamagedCheckpointError, UnsupportedStateError
from dcp_engine.format import dtypes, names

SETTINGS = settings(max_examples=100, deadline=None)

# As in docs/format.md, copied by hand: a change here is a change of the format.
CODES = {
    0: "bool", 1: "uint8", 2: "int8", 3: "uint16", 4: "int16", 5: "uint32", 6: "int32",
    7: "uint64", 8: "int64", 9: "float16", 10: "bfloat16", 11: "float32", 12: "float64",
    13: "complex32", 14: "complex64", 15: "complex128", 16: "float8_e4m3fn", 17: "float8_e5m2",
    18: "float8_e4m3fnuz", 19: "float8_e5m2fnuz", 20: "float8_e8m0fnu", 21: "float4_e2m1fn_x2",
    22: "bits8", 23: "bits16", 24: "bits1x8", 25: "bits2x4", 26: "bits4x2",
    27: "uint1", 28: "uint2", 29: "uint3", 30: "uint4", 31: "uint5", 32: "uint6", 33: "uint7",
    34: "int1", 35: "int2", 36: "int3", 37: "int4", 38: "int5", 39: "int6", 40: "int7",
}  # fmt: skip


def test_codes_are_those_of_the_specification() -> None:
    assert {code: entry.name for code, entry in dtypes.DTYPES.items()} == {
        code: name for code, name in CODES.items() if hasattr(torch, name)
    }


def test_every_dtype_of_this_torch_has_a_code_or_is_quantized() -> None:
    every = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    for dtype in every:
        if "qu" in str(dtype) or "qint" in str(dtype):
            with pytest.raises(UnsupportedStateError, match="cannot be stored"):
                dtypes.code_of(dtype)
        else:
            entry = dtypes.info(dtypes.code_of(dtype))
            assert entry.dtype is dtype
            assert dtypes.by_name(entry.name) is entry
            assert entry.itemsize == dtype.itemsize


def test_unknown_dtypes_are_named() -> None:
    with pytest.raises(DamagedCheckpointError, match="code 200"):
        dtypes.info(200)
    with pytest.raises(DamagedCheckpointError, match="float12"):
        dtypes.by_name("float12")


@pytest.mark.parametrize(
    ("name", "shape", "stored"),
    [
        ("float32", (2, 3), ("F32", (2, 3))),
        ("complex128", (2, 3), ("U8", (2, 3, 16))),
        ("int4", (), ("U8", (1,))),
        ("float4_e2m1fn_x2", (2, 3), ("F4", (2, 6))),
        ("float4_e2m1fn_x2", (), ("F4", (2,))),
    ],
)
def test_shape_in_a_header(
    name: str, shape: tuple[int, ...], stored: tuple[str, tuple[int, ...]]
) -> None:
    if not hasattr(torch, name):
        pytest.skip(f"this torch has no {name}")
    assert dtypes.stored_shape(dtypes.by_name(name), shape) == stored


@SETTINGS
@given(st.integers(0, names.MAX_RANKS - 1), st.integers(0, names.MAX_RANKS - 1))
def test_names_round_trip(rank: int, number: int) -> None:
    assert names.parse_data_file_name(names.data_file_name(rank, number)) == (rank, number)
    assert names.parse_digest_file_name(names.digest_file_name(rank)) == rank
    assert names.parse_rank_manifest_name(names.rank_manifest_name(rank)) == rank


def test_names_are_spelled_as_specified() -> None:
    assert names.data_file_name(3, 1) == "rank00003-01.safetensors"
    assert names.digest_file_name(3) == "rank00003.digests"
    assert names.rank_manifest_name(3) == "manifest-rank00003.json"
    save_id = names.new_save_id()
    assert names.data_directory(save_id) == f"data-{save_id}"
    assert names.parse_data_directory(f"data-{save_id}") == save_id


@pytest.mark.parametrize(
    "name",
    [
        "rank3-01.safetensors",
        "rank000003-01.safetensors",
        "rank00003-001.safetensors",
        "rank00003-01.safetensors\n",
        "rank00003-01.safetensors.tmp",
        "../rank00003-01.safetensors",
        "rank\u0660\u0660\u0660\u0660\u0663-01.safetensors",
    ],
)
def test_other_spellings_are_no_data_files(name: str) -> None:
    assert names.parse_data_file_name(name) is None


@pytest.mark.parametrize(
    "name", ["data-", "data-" + "g" * 32, "data-" + "A" * 32, "data-" + "0" * 33, "data-x/../.."]
)
def test_only_exact_names_are_data_directories(name: str) -> None:
    assert names.parse_data_directory(name) is None


def test_a_save_id_must_be_one() -> None:
    with pytest.raises(ValueError, match="32"):
        names.data_directory("../../etc")


@pytest.mark.parametrize("number", [-1, names.MAX_RANKS])
def test_numbers_out_of_range_have_no_name(number: int) -> None:
    with pytest.raises(ValueError, match="from 0 to"):
        names.data_file_name(0, number)


@pytest.mark.parametrize(
    "name",
    [
        "", "/etc/passwd", "..", "a/../b", "a//b", "a/", "./a", "a\\b", "c:a", "a\x00b", "a\nb",
        "x" * 256, "/".join(["abc"] * 300), "\ud800",
    ],
)  # fmt: skip
def test_unsafe_extra_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        names.extra_file_name(name)


def test_extra_names() -> None:
    assert names.extra_file_name("config/größe.json") == "extra/config/größe.json"
    assert names.check_extra_name("config.json") is not None


OWNER = names.OwnerRecord(
    run_id="run", restart_count=2, group="default", host="node7", boot_id="b-1", pid=1234
)


def test_owner_round_trip() -> None:
    assert names.decode_owner(names.encode_owner(OWNER)) == OWNER


@SETTINGS
@given(st.data())
def test_a_damaged_owner_record_is_an_error_or_another_record(data: st.DataObject) -> None:
    encoded = bytearray(names.encode_owner(OWNER))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        names.decode_owner(bytes(encoded))
    except CheckpointError as error:
        assert error.kind == "manifest_invalid"
