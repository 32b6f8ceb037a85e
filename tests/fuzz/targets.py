"""What is fuzzed: for each reader of foreign bytes, how its input is made and looked at.

A target draws one hostile input, hands it to the reader, and uses all that comes back as the
engine would. Belongs here: those functions, in ``TARGETS``. Does not belong here: what must
come out, in which memory and time (``test_readers``).
"""

from __future__ import annotations

import datetime
import enum
import io
import json
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import torch
from hypothesis import strategies as st

from dcp_engine.errors import CheckpointError
from dcp_engine.format.digest import block_digests, decode_digests, encode_digests
from dcp_engine.format.dtypes import code_of
from dcp_engine.format.manifest import Manifest, decode_manifest, merge_manifests
from dcp_engine.format.metadata_view import ManifestMetadata
from dcp_engine.format.names import OwnerRecord, decode_owner, encode_owner
from dcp_engine.format.nesting import Nesting, encode_nesting, merge_nestings
from dcp_engine.format.object_codec import decode_object, encode_object
from dcp_engine.format.shard_file import HeaderEntry, encode_header, parse_header
from dcp_engine.planning.columns import LocalPlan
from dcp_engine.planning.global_plan import assignments, make_global_plan
from dcp_engine.planning.shared_interests import Interests
from dcp_engine.planning.shared_reads import plan_shared_reads
from dcp_engine.planning.shared_wire import (
    decode_interests,
    decode_share,
    encode_interests,
    encode_share,
)
from dcp_engine.planning.wire import (
    decode_assignment,
    decode_local_plans,
    encode_assignment,
    encode_local_plan,
)
from dcp_engine.registry import BackendRegistry, is_chained, scheme_of
from storage_backends.url_options import split_query
from tests.format.builders import Content, Row, files, full_content, sign
from tests.fuzz.mutations import Pairs, mutate_bytes, mutate_tree, render, tree_of
from tests.planning.layouts import local_plans, obj, per_rank, replicated, sharded

Run = Callable[[], object]
Target = Callable[[st.DataObject], tuple[int, Run]]
"""Draws an input; returns its size in bytes, and the call that must survive it."""


# manifests ---------------------------------------------------------------------------------------


def look_at(manifest: Manifest) -> None:
    """Everything that is decoded only when it is asked for."""
    refusals: list[CheckpointError] = []
    for look in (
        manifest.validate,
        manifest.nesting.paths,
        lambda: [tensor.chunks for tensor in manifest.all_tensors()],
        lambda: [
            manifest.tensors.whole(list(manifest.tensors))  # type: ignore[attr-defined]
            if hasattr(manifest.tensors, "whole")
            else None
        ],
        lambda: dict(ManifestMetadata.of(manifest).state_dict_metadata),
        lambda: [file.name for file in (*manifest.data_files, *manifest.digest_files)],
    ):
        try:
            look()
        except CheckpointError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def _signed(tree: Any) -> bytes:
    return sign(render(tree)[:-1])


def _fields(manifest: bytes) -> Pairs:
    fields = json.loads(manifest)
    del fields["manifest_xxh3_128"]
    return tree_of(fields)  # type: ignore[no-any-return]


GOOD = full_content().encode()


def manifest_fields(data: st.DataObject) -> tuple[int, Run]:
    hostile = _signed(mutate_tree(data, _fields(GOOD)))
    return len(hostile), lambda: look_at(decode_manifest(hostile, checkpoint="step-1"))


def manifest_bytes(data: st.DataObject) -> tuple[int, Run]:
    body = mutate_bytes(data, render(_fields(GOOD))[:-1])
    hostile = sign(body) if data.draw(st.booleans()) else mutate_bytes(data, GOOD)
    return len(hostile), lambda: look_at(decode_manifest(hostile, checkpoint="step-1"))


def _of_rank(rank: int) -> bytes:
    return Content(
        rows=[
            Row(name="w", shape=(4, 6), chunks=[((2 * rank, 0), (2, 6), 0, 0)]),
            Row(name="b", shape=(), chunks=[((), (), 0, 48)], dtype=torch.int64),
            Row(name="rng", shape=(4,), chunks=[((0,), (4,), 0, 56)], dtype=torch.uint8,
                owner=rank),
        ],
        data_files=files(60, rank=rank),
        nesting=encode_nesting({"w": ("w",), "b": ("b",)}, {}),
        token="token",
        rank=rank,
    ).encode()  # fmt: skip


RANKS = (_of_rank(0), _of_rank(1))


def rank_manifests(data: st.DataObject) -> tuple[int, Run]:
    hostile = list(RANKS)
    which = data.draw(st.integers(0, 1))
    hostile[which] = _signed(mutate_tree(data, _fields(RANKS[which]), most=2))
    return sum(map(len, hostile)), lambda: look_at(
        merge_manifests([decode_manifest(part) for part in hostile])
    )


NESTING = encode_nesting(
    {"a.b": ("a", "b"), "a.0": ("a", 0), "l.0.x": ("l", 0, "x"), "odd": ("t", 0), "s": ("s",)},
    {("a",): "dict", ("l",): "list", ("l", 0): "dict", ("t",): "tuple"},
)


def nesting(data: st.DataObject) -> tuple[int, Run]:
    tree = tree_of(json.loads(NESTING))
    mutated = data.draw(st.booleans())
    hostile = render(mutate_tree(data, tree)) if mutated else mutate_bytes(data, NESTING)

    def run() -> None:
        merge_nestings([NESTING, hostile])
        read = Nesting(hostile)
        read.unflatten(dict.fromkeys(read.paths()))

    return len(hostile), run


OWNER = encode_owner(
    OwnerRecord(run_id="r", restart_count=1, group="g", host="h", boot_id="b/1", pid=7)
)


def owner_record(data: st.DataObject) -> tuple[int, Run]:
    hostile = render(mutate_tree(data, tree_of(json.loads(OWNER))))
    return len(hostile), lambda: decode_owner(hostile)


# files -------------------------------------------------------------------------------------------

HEADER = encode_header(
    [
        HeaderEntry("model.weight@0,0", code_of(torch.float32), (2, 6), 0, 48),
        HeaderEntry("model.bias", code_of(torch.bfloat16), (6,), 48, 60),
        HeaderEntry("blob", code_of(torch.uint8), (30,), 60, 90),
    ],
    {"format": "pt"},
)
SECTION = 90


def safetensors_header(data: st.DataObject) -> tuple[int, Run]:
    length = int.from_bytes(HEADER[:8], "little")
    how = data.draw(st.sampled_from(["fields", "fields", "bytes", "length"]))
    if how == "fields":
        body = render(mutate_tree(data, tree_of(json.loads(HEADER[8:]))))
        body += b" " * (-(8 + len(body)) % 4096)
        prefix = len(body).to_bytes(8, "little") + body
    elif how == "bytes":
        prefix = mutate_bytes(data, HEADER[: HEADER.rindex(b"}") + 1])
        prefix += b" " * (8 + length - len(prefix))
    else:
        lie = data.draw(st.sampled_from([0, 1, 2, length - 1, length + 1, 1 << 31, 1 << 62]))
        lie = data.draw(st.sampled_from([lie, (1 << 64) - 1 - lie]))
        prefix = lie.to_bytes(8, "little") + HEADER[8:]
    size = len(prefix) + data.draw(st.sampled_from([SECTION, SECTION - 1, 0, 1 << 62, -1]))
    return len(prefix), lambda: parse_header(prefix, size)


def _digests() -> bytes:
    blocks = [block_digests(bytes(n), 512) for n in (700, 512, 30)]
    return encode_digests(
        block_size=512,
        header_digests=[(0, 5), (1, 6)],
        file=np.array([0, 0, 1], np.int32),
        start=np.array([0, 700, 0], np.int64),
        nbytes=np.array([700, 512, 30], np.int64),
        blocks=blocks,
    )


DIGESTS = _digests()


def digest_file(data: st.DataObject) -> tuple[int, Run]:
    if data.draw(st.booleans()):
        # One 4- or 8-byte field: counts, positions, file numbers.
        width = data.draw(st.sampled_from([4, 8]))
        at = width * data.draw(st.integers(0, len(DIGESTS) // width - 1))
        number = data.draw(st.sampled_from([0, 1, 2, 3, 1 << 20, 1 << 30, (1 << 31) - 1]))
        number = data.draw(st.sampled_from([number, (1 << 8 * width) - 1 - number, 1 << 60 >> 64 - 8 * width]))  # fmt: skip # noqa: E501
        hostile = DIGESTS[:at] + number.to_bytes(width, "little") + DIGESTS[at + width :]
    else:
        hostile = mutate_bytes(data, DIGESTS)

    def run() -> None:
        table = decode_digests(hostile)
        for file, start in zip(table.file.tolist(), table.start.tolist(), strict=True):
            table.lookup(file, start)
            table.rows(np.array([file]), np.array([start]))

    return len(hostile), run


class Colour(enum.Enum):
    """Something to find by name."""

    RED = 1


VALUES: tuple[object, ...] = (
    {"lr": 0.1, "betas": (0.9, 0.999), "groups": [{"params": list(range(20))}], 3: None},
    [1.5] * 10, {1, 2, "a"}, frozenset({b"x", (1, 2)}), "text" * 20, -(1 << 200), 3j, bytearray(9),
    np.arange(6, dtype="<i4").reshape(2, 3), np.float32(1.5), np.array(["a", "bc"]),
    np.datetime64("2026-01-01"), torch.Size([2, 3]), torch.bfloat16, torch.device("cuda:1"),
    datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), datetime.time(1, 2), datetime.timedelta(1),
    datetime.date(2026, 1, 1), range(3, 9), Colour.RED,
)  # fmt: skip
TAGGED = tuple(encode_object(value, fqn="v").data for value in VALUES)


def tagged_object(data: st.DataObject) -> tuple[int, Run]:
    hostile = mutate_bytes(data, data.draw(st.sampled_from(TAGGED)))
    hostile = b"\x01" + hostile[1:]
    return len(hostile), lambda: decode_object(hostile, False, fqn="v", checkpoint="step-1")


def _pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(6.0).reshape(2, 3), "n": [1, (2, "x")]}, buffer)
    return buffer.getvalue()


PICKLED = _pickled()


def pickled_object(data: st.DataObject) -> tuple[int, Run]:
    hostile = mutate_bytes(data, PICKLED)
    return len(hostile), lambda: decode_object(hostile, True, fqn="v", checkpoint="step-1")


# on the wire -------------------------------------------------------------------------------------


@cache
def _plans() -> tuple[LocalPlan, ...]:
    return tuple(
        local_plans(
            [
                [
                    sharded("layer.weight", (8, 4), rank, [2], [0]),
                    replicated("layer.bias", (4,)),
                    per_rank("rng", (3 + rank,), dtype=torch.uint8),
                    obj("step"),
                ]
                for rank in range(2)
            ]
        )
    )


def _unpacked(frame: list[Any], at: int) -> None:
    """Replace the compressed columns at ``frame[at]`` by (types, counts, plain bytes)."""
    types, counts, compressed = frame[at]
    frame[at] = [types, counts, zlib.decompress(compressed)]


def _packed_again(value: Any) -> Any:
    """Compress the columns again, whatever has become of them."""
    if isinstance(value, list) and len(value) == 3 and isinstance(value[2], bytes):
        return [value[0], value[1], zlib.compress(value[2], 1)]
    return value


def _encoded(tree: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(tree)
    except (OverflowError, ValueError):  # an integer that MessagePack cannot hold
        return b"\xcf" + b"\xff" * 8


def local_plan(data: st.DataObject) -> tuple[int, Run]:
    good = encode_local_plan(_plans()[1])
    if data.draw(st.integers(0, 3)) == 0:
        hostile = mutate_bytes(data, good)
    else:
        frame = msgspec.msgpack.decode(good)
        part = data.draw(st.sampled_from(["frame", "table", "boxes"]))
        if part == "table":
            table = msgspec.msgpack.decode(zlib.decompress(frame[3]))
            _unpacked(table, 5)
            table = mutate_tree(data, table, binary=True)
            if isinstance(table, list) and len(table) > 5:
                table[5] = _packed_again(table[5])
            raw = _encoded(table)
            frame[2:4] = [len(raw), zlib.compress(raw)]
        elif part == "boxes":
            _unpacked(frame, 4)
            frame[4] = _packed_again(mutate_tree(data, frame[4], binary=True))
        else:
            frame = mutate_tree(data, frame, binary=True)
        hostile = _encoded(frame)

    def run() -> None:
        plans = decode_local_plans([encode_local_plan(_plans()[0]), hostile])
        plan = make_global_plan(plans, coordinator_rank=0)
        list(assignments(plan, plans))

    return len(hostile), run


def assignment(data: st.DataObject) -> tuple[int, Run]:
    plans = _plans()
    good = [
        encode_assignment(mine, own)
        for mine, own in zip(
            assignments(make_global_plan(plans, coordinator_rank=0), plans), plans, strict=True
        )
    ]
    rank = data.draw(st.integers(0, 1))
    frame = msgspec.msgpack.decode(good[rank])
    if data.draw(st.integers(0, 3)) == 0:
        hostile = mutate_bytes(data, good[rank])
    else:
        _unpacked(frame, 1)
        frame = mutate_tree(data, frame, binary=True)
        if isinstance(frame, list) and len(frame) > 1:
            frame[1] = _packed_again(frame[1])
        hostile = _encoded(frame)
    own = plans[rank]

    def run() -> None:
        got = decode_assignment(hostile, own)
        whole = own.chunks.sizes.take(got.source, axis=0)
        # What the writer relies on when it takes slices of this rank's tensors.
        assert (got.sizes >= 1).all() and (got.within >= 0).all()
        assert (got.sizes <= whole).all() and (got.within <= whole - got.sizes).all()
        assert (got.nbytes > 0).all() and (got.start >= 0).all()

    return len(hostile), run


def _interests() -> Interests:
    """Of a rank that needs two rows of a chunk of 64, and a whole one."""
    one = np.array([0, 0], np.int64)
    return Interests(
        file=one,
        chunk_start=np.array([0, 1 << 20], np.int64),
        itemsize=np.array([4, 4], np.int64),
        chunk_sizes=np.array([[64, 1024], [64, 1024]], np.int64),
        within=np.array([[8, 0], [0, 0]], np.int64),
        lengths=np.array([[2, 1024], [64, 1024]], np.int64),
    )


def shared_reads(data: st.DataObject) -> tuple[int, Run]:
    interests = _interests()
    shares = plan_shared_reads(
        [interests] * 2, block_size=65536, slab_bytes=1 << 20, round_bytes=64 << 20
    )
    kind = data.draw(st.sampled_from(["interests", "share"]))
    good = encode_interests(interests) if kind == "interests" else encode_share(shares[1])
    if data.draw(st.integers(0, 3)) == 0:
        hostile = mutate_bytes(data, good)
    else:
        frame = msgspec.msgpack.decode(good)
        _unpacked(frame, 1)
        frame = mutate_tree(data, frame, binary=True)
        if isinstance(frame, list) and len(frame) > 1:
            frame[1] = _packed_again(frame[1])
        hostile = _encoded(frame)
    decode: Callable[[bytes], object] = decode_interests if kind == "interests" else decode_share
    return len(hostile), lambda: decode(hostile)


# places ------------------------------------------------------------------------------------------

URLS = (
    "s3://bucket/run/step-1?endpoint_url=http://127.0.0.1:1&anon=true&retries=5",
    "simplecache::s3://bucket/run?key=1&s3={\"a\":[1,2]}",
    "sftp://user:secret@host:22/run?compress=none", "file:///tmp/x", "/tmp/x", "memory://a/b",
    "https://host/x?sig=1",
)  # fmt: skip
_QUERY = ("9" * 5000, "-" + "9" * 4400, "[" * 50_000, '{"a":' * 5000, "{NaN}", "[NaN]", "[1e999]",
          "%00", "%ff", "&a=1&a=2", "=", "true", "None", "+", "\u0660", "[" + "9" * 5000 + "]",
          "::", "://", "?", "file:", "\x00", "\ud800")  # fmt: skip


def storage_url(data: st.DataObject) -> tuple[int, Run]:
    url = data.draw(st.sampled_from(URLS))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(url)) | st.just(len(url)))
        piece = data.draw(st.sampled_from(_QUERY) | st.text(max_size=4))
        before = data.draw(st.sampled_from(["", "", "?a=", "&b="]))
        url = url[:at] + before + piece + url[at + data.draw(st.integers(0, 3)) :]
    registry = BackendRegistry({}, entry_points=[])

    def run() -> None:
        scheme_of(url), is_chained(url)
        place, options = split_query(url)
        assert len(place) <= len(url) and all(isinstance(name, str) for name in options)
        registry.backend(url)

    return len(url), run


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.__name__: target
        for target in (
            manifest_fields, manifest_bytes, rank_manifests, nesting, owner_record,
            safetensors_header, digest_file, tagged_object, pickled_object,
            local_plan, assignment, shared_reads, storage_url,
        )
    }
)  # fmt: skip
