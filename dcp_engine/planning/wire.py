"""Plans on the wire: local plans to the coordinator, assignments back.

A local plan is two compressed parts: the table (names, dtypes, shapes, aliases, nesting), which
is mostly the same on all ranks, and this rank's boxes. ``decode_local_plans`` decodes equal
tables once and lets the plans share them; the global plan recognises shared tables. Boxes are
stored as what a regular sharding makes small: how many parts a dimension has and which part this
is, with the rest where it is not regular. An assignment refers to the receiver's own local plan
and carries only what the receiver cannot derive from it.

Belongs here: encoding, version and validation. Does not belong here: any decision.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from dcp_engine.planning.arrays import all_rows, row_products
from dcp_engine.planning.columns import (
    NO_OWNER,
    UNDECIDED_ALIAS,
    Chunks,
    LocalPlan,
    ObjectTable,
    RankAssignment,
    TensorTable,
)
from dcp_engine.planning.item_sizes import item_sizes
from dcp_engine.planning.packing import Packed, inflate, malformed, pack, unpack
from dcp_engine.state.values import EntryKind

__all__ = [
    "decode_assignment",
    "decode_local_plan",
    "decode_local_plans",
    "encode_assignment",
    "encode_local_plan",
]

VERSION = 1
_MAX_DIMS = 64
_MAX_OWNER = (1 << 31) - 1
_LOCAL_LEVEL = 9
"""Each rank compresses its own plan, so a better level costs the coordinator nothing."""
_ASSIGNMENT_LEVEL = 1

I64 = npt.NDArray[np.int64]


class _Table(msgspec.Struct, array_like=True, frozen=True):
    suffixes: list[str]
    """Of each name, what differs from the name before it."""
    kinds: bytes
    dtypes: bytes
    ndims: bytes
    dims: int
    numbers: Packed
    object_names: list[str]
    object_kinds: bytes
    containers: bytes


class _LocalFrame(msgspec.Struct, array_like=True, frozen=True):
    version: int
    owner: int
    table_size: int
    table: bytes
    boxes: Packed


class _AssignmentFrame(msgspec.Struct, array_like=True, frozen=True):
    version: int
    numbers: Packed
    objects: list[int]


@dataclass(frozen=True, kw_only=True)
class _SharedTable:
    """What plans of several ranks can have in common."""

    tensors: TensorTable
    aliases: npt.NDArray[np.int32]
    objects: ObjectTable
    containers: bytes


def encode_local_plan(plan: LocalPlan) -> bytes:
    """``plan`` as bytes; the same plan gives the same bytes."""
    table, chunks = plan.tensors, plan.chunks
    prefixes, suffixes = _front_coded(table.names)
    raw = msgspec.msgpack.encode(
        _Table(
            suffixes=suffixes,
            kinds=table.kinds.tobytes(),
            dtypes=table.dtypes.tobytes(),
            ndims=table.ndims.tobytes(),
            dims=table.shapes.shape[1],
            # Level 0: this part is compressed again together with the names.
            numbers=pack(
                [(prefixes, False), (table.shapes.ravel(), False), (plan.aliases, False)], level=0
            ),
            object_names=list(plan.objects.names),
            object_kinds=plan.objects.kinds.tobytes(),
            containers=plan.containers,
        )
    )
    return msgspec.msgpack.encode(
        _LocalFrame(
            version=VERSION,
            owner=int(table.owners.max(initial=NO_OWNER)),
            table_size=len(raw),
            table=zlib.compress(raw, _LOCAL_LEVEL),
            boxes=_pack_boxes(table.shapes, chunks),
        )
    )


def decode_local_plan(data: bytes) -> LocalPlan:
    """The inverse of ``encode_local_plan``.

    Raises ``CoordinationError(kind="out_of_step")`` for what no encoder of this version wrote.
    """
    return decode_local_plans([data])[0]


def decode_local_plans(messages: Sequence[bytes]) -> list[LocalPlan]:
    """Decode the plans of many ranks; equal tables are decoded once and shared."""
    tables: dict[bytes, _SharedTable] = {}
    plans: list[LocalPlan] = []
    for data in messages:
        try:
            frame = _LOCAL_DECODER.decode(data)
        except msgspec.MsgspecError as error:
            raise malformed(str(error)) from error
        _check_version(frame.version)
        if not NO_OWNER <= frame.owner <= _MAX_OWNER:
            raise malformed(f"the owner of its values is rank {frame.owner}")
        shared = tables.get(frame.table)
        if shared is None:
            shared = tables[frame.table] = _decode_table(frame)
        tensors = shared.tensors
        if frame.owner != NO_OWNER:
            tensors = _owned_by(tensors, frame.owner)
        plans.append(
            LocalPlan(
                tensors=tensors,
                chunks=_unpack_boxes(tensors.shapes, frame.boxes),
                aliases=shared.aliases,
                objects=shared.objects,
                containers=shared.containers,
            )
        )
    return plans


def encode_assignment(assignment: RankAssignment, local: LocalPlan) -> bytes:
    """``assignment`` as bytes, for the rank whose local plan is ``local``."""
    sizes = local.chunks.sizes.take(assignment.source, axis=0)
    parts = np.flatnonzero(~all_rows(sizes == assignment.sizes))
    index = {name: row for row, name in enumerate(local.objects.names)}
    return msgspec.msgpack.encode(
        _AssignmentFrame(
            version=VERSION,
            numbers=pack(
                [
                    (assignment.source, True),
                    (assignment.file, True),
                    (assignment.file_data_bytes, False),
                    (parts, True),
                    (assignment.within[parts].ravel(), False),
                    (assignment.sizes[parts].ravel(), False),
                ],
                level=_ASSIGNMENT_LEVEL,
            ),
            objects=[index[name] for name in assignment.objects],
        )
    )


def decode_assignment(data: bytes, local: LocalPlan) -> RankAssignment:
    """The inverse of ``encode_assignment``, on the rank whose local plan is ``local``.

    Raises ``CoordinationError(kind="out_of_step")`` if it does not belong to ``local``.
    """
    try:
        frame = _ASSIGNMENT_DECODER.decode(data)
    except msgspec.MsgspecError as error:
        raise malformed(str(error)) from error
    _check_version(frame.version)
    source, file, file_bytes, parts, part_within, part_sizes = unpack(frame.numbers, 6)
    chunks, dims = local.chunks, local.chunks.sizes.shape[1]
    files = len(file_bytes)
    if (
        len(file) != len(source)
        or _outside(source, len(chunks.tensor))
        or _outside(file, files)
        or _outside(parts, len(source))
        or len(part_within) != len(parts) * dims
        or len(part_sizes) != len(parts) * dims
        or any(not 0 <= row < len(local.objects.names) for row in frame.objects)
    ):
        raise malformed("an assignment does not fit this rank's local plan")
    within = np.zeros((len(source), dims), dtype=np.int64)
    sizes = chunks.sizes.take(source, axis=0)
    within[parts] = part_within.reshape(len(parts), dims)
    sizes[parts] = part_sizes.reshape(len(parts), dims)
    whole = chunks.sizes.take(source, axis=0)
    # Compared with what is left rather than added up: the sum of two wrong numbers could wrap.
    if not all_rows(
        (within >= 0) & (within < whole) & (sizes >= 1) & (sizes <= whole - within)
    ).all():
        raise malformed("an assigned box lies outside this rank's tensor")
    rows = chunks.tensor.take(source)
    nbytes = row_products(sizes) * item_sizes(local.tensors.dtypes).take(rows)
    return RankAssignment(
        source=source.astype(np.int32),
        within=within,
        offsets=chunks.offsets.take(source, axis=0) + within,
        sizes=sizes,
        file=file.astype(np.int32),
        start=_starts(file, nbytes),
        nbytes=nbytes,
        file_data_bytes=file_bytes,
        objects=tuple(local.objects.names[row] for row in frame.objects),
    )


def _starts(file: I64, nbytes: I64) -> I64:
    """Chunks lie gapless, in order, from the begin of each file."""
    ends = np.cumsum(nbytes)
    starts = ends - nbytes
    if len(file):
        first = np.flatnonzero(np.diff(file, prepend=file[0] - 1))
        starts -= np.repeat(starts[first], np.diff(np.append(first, len(file))))
    return starts


def _front_coded(names: Sequence[str]) -> tuple[I64, list[str]]:
    """Names of a state dict have long prefixes in common with their neighbours: 1,000 names of
    30 bytes take 400 bytes this way after compression, 2,900 without."""
    prefixes = np.zeros(len(names), dtype=np.int64)
    suffixes: list[str] = []
    before = ""
    for row, name in enumerate(names):
        shared = _shared_prefix(before, name)
        prefixes[row] = shared
        suffixes.append(name[shared:])
        before = name
    return prefixes, suffixes


def _shared_prefix(one: str, two: str) -> int:
    for at, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            return at
    return min(len(one), len(two))


def _names(prefixes: Sequence[int], suffixes: Sequence[str]) -> tuple[str, ...]:
    names: list[str] = []
    before = ""
    for shared, suffix in zip(prefixes, suffixes, strict=True):
        if not 0 <= shared <= len(before):
            raise malformed("a name shares more with the one before it than that has")
        before = before[:shared] + suffix
        names.append(before)
    return tuple(names)


def _decode_table(frame: _LocalFrame) -> _SharedTable:
    try:
        table = _TABLE_DECODER.decode(inflate(frame.table, frame.table_size))
    except msgspec.MsgspecError as error:
        raise malformed(str(error)) from error
    count, dims = len(table.suffixes), table.dims
    prefixes, shapes, aliases = unpack(table.numbers, 3)
    kinds, dtypes, ndims = (
        np.frombuffer(column, dtype=np.uint8) for column in (table.kinds, table.dtypes, table.ndims)
    )
    object_kinds = np.frombuffer(table.object_kinds, dtype=np.uint8)
    if (
        not 1 <= dims <= _MAX_DIMS
        or {len(prefixes), len(kinds), len(dtypes), len(ndims), len(aliases)} != {count}
        or len(shapes) != count * dims
        or len(object_kinds) != len(table.object_names)
        or (shapes < 0).any()
        or (ndims > dims).any()
        or (kinds > max(EntryKind)).any()
        or (object_kinds > max(EntryKind)).any()
        or (aliases < UNDECIDED_ALIAS).any()
        or (aliases >= count).any()
    ):
        raise malformed("the columns of a tensor table contradict each other")
    return _SharedTable(
        tensors=TensorTable(
            names=_names(prefixes.tolist(), table.suffixes),
            kinds=kinds,
            dtypes=dtypes,
            ndims=ndims,
            shapes=shapes.reshape(count, dims),
            owners=np.full(count, NO_OWNER, dtype=np.int32),
        ),
        aliases=aliases.astype(np.int32),
        objects=ObjectTable(
            names=tuple(table.object_names),
            kinds=object_kinds,
            owners=np.full(len(object_kinds), NO_OWNER, dtype=np.int32),
        ),
        containers=table.containers,
    )


def _owned_by(table: TensorTable, rank: int) -> TensorTable:
    owners = np.where(table.kinds == EntryKind.PER_RANK, rank, NO_OWNER).astype(np.int32)
    return TensorTable(
        names=table.names,
        kinds=table.kinds,
        dtypes=table.dtypes,
        ndims=table.ndims,
        shapes=table.shapes,
        owners=owners,
    )


def _pack_boxes(shapes: I64, chunks: Chunks) -> Packed:
    whole = shapes.take(chunks.tensor, axis=0)
    cut = (chunks.offsets != 0) | (chunks.sizes != whole)
    extent, size, offset = whole[cut], chunks.sizes[cut], chunks.offsets[cut]
    # A regular sharding into n parts has size ceil(extent / n) and offset part * size: n and the
    # part's number are the same for most tensors and compress to nothing, the rest is zero.
    parts = -(-extent // size)
    irregular_size = size - -(-extent // parts)
    part, irregular_offset = np.divmod(offset, size)
    return pack(
        [
            (chunks.tensor, True),
            (np.packbits(cut.ravel()), False),
            (parts, False),
            (irregular_size, False),
            (part, False),
            (irregular_offset, False),
        ],
        level=_LOCAL_LEVEL,
    )


def _unpack_boxes(shapes: I64, packed: Packed) -> Chunks:
    tensor, bits, parts, irregular_size, part, irregular_offset = unpack(packed, 6)
    dims = shapes.shape[1]
    total = len(tensor) * dims
    if _outside(tensor, len(shapes)) or len(bits) != -(-total // 8):
        raise malformed("boxes of tensors that are not in the table")
    cut = np.unpackbits(bits.astype(np.uint8), count=total).view(np.bool_).reshape(-1, dims)
    sizes = shapes.take(tensor, axis=0)
    offsets = np.zeros_like(sizes)
    extent = sizes[cut]
    if {len(parts), len(irregular_size), len(part), len(irregular_offset)} != {len(extent)} or (
        parts < 1
    ).any():
        raise malformed("the columns of a box table contradict each other")
    size = -(-extent // parts) + irregular_size
    sizes[cut] = size
    offsets[cut] = part * size + irregular_offset
    if (sizes < 1).any() or (offsets < 0).any():
        raise malformed("an empty box, or one that begins before its tensor")
    return Chunks(tensor=tensor.astype(np.int32), offsets=offsets, sizes=sizes)


def _outside(rows: I64, count: int) -> bool:
    return len(rows) > 0 and not (rows.min() >= 0 and rows.max() < count)


def _check_version(version: int) -> None:
    if version != VERSION:
        raise malformed(f"wire version {version}, this is version {VERSION}")


_LOCAL_DECODER = msgspec.msgpack.Decoder(_LocalFrame)
_TABLE_DECODER = msgspec.msgpack.Decoder(_Table)
_ASSIGNMENT_DECODER = msgspec.msgpack.Decoder(_AssignmentFrame)
