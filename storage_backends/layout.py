"""What one rank's data files will hold, byte by byte, before anything is written.

Belongs here: pure functions from an assignment (or a list of sized items) to files. Does not
belong here: writing them (``write_files``), and deciding who writes what (``planning``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dcp_engine.errors import InvalidPlanError
from dcp_engine.format.dtypes import code_of
from dcp_engine.format.object_codec import EncodedObject
from dcp_engine.native_storage import ObjectReport
from dcp_engine.planning.columns import RankAssignment
from storage_backends.tensor_bytes import box_of, has_viewable_memory

__all__ = [
    "INLINE_LIMIT",
    "FileLayout",
    "Piece",
    "RankLayout",
    "lay_out_assignment",
    "place_objects",
]

INLINE_LIMIT = 4096
"""Bytes of an encoded object that may stand in the manifest itself."""


class Piece(NamedTuple):
    """One chunk of a data file. A tuple: there may be a million of them."""

    name: str
    """Fully qualified name."""
    offsets: tuple[int, ...] | None
    """Where the box lies in the global tensor; None for a whole tensor, and for an object."""
    code: int
    """Dtype, as ``format.dtypes`` numbers it."""
    shape: tuple[int, ...]
    start: int
    """Bytes behind the begin of the data section."""
    nbytes: int
    data: Callable[[], torch.Tensor | memoryview]
    """The box, when its turn has come: a strided tensor on any device, or bytes."""
    splittable: bool = False
    """``data`` may be asked for more than once, and is bytes of this memory: several threads may
    each write a part."""


@dataclass(frozen=True, kw_only=True)
class FileLayout:
    """One data file."""

    number: int
    pieces: tuple[Piece, ...]
    """In order of ``start``, without gaps."""
    data_bytes: int


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """All that one rank writes."""

    files: tuple[FileLayout, ...]
    objects: tuple[ObjectReport, ...]
    """Where each object is, the inline ones included."""
    chunks: int
    """Pieces that are tensors."""


def lay_out_assignment(
    assignment: RankAssignment,
    names: Sequence[str],
    shapes: Sequence[Sequence[int]],
    tensors: Sequence[torch.Tensor],
    objects: Mapping[str, EncodedObject],
    inline: frozenset[str],
) -> RankLayout:
    """The files of ``assignment``; ``names``, ``shapes`` (global) and ``tensors`` are those of
    the rows that ``assignment.source`` refers to.

    Raises ``InvalidPlanError(kind="results_mismatch")`` when the assignment does not fit the
    tensors, or leaves gaps: it was made for another state than this.
    """
    totals = assignment.file_data_bytes.tolist()
    pieces: list[list[Piece]] = [[] for _ in totals]
    ends = [0] * len(totals)
    codes: dict[torch.dtype, int] = {}
    for source, within, offsets, sizes, file, start, nbytes in zip(
        assignment.source.tolist(),
        assignment.within.tolist(),
        assignment.offsets.tolist(),
        assignment.sizes.tolist(),
        assignment.file.tolist(),
        assignment.start.tolist(),
        assignment.nbytes.tolist(),
        strict=True,
    ):
        name, tensor = names[source], tensors[source]
        box = box_of(tensor, within, sizes)
        ndim = box.ndim
        if start != ends[file] or box.numel() * box.element_size() != nbytes:
            raise _misfit(f"{nbytes} bytes at {start} are assigned to a box of {box.shape}", name)
        ends[file] += nbytes
        code = codes.get(box.dtype)
        if code is None:
            code = codes[box.dtype] = code_of(box.dtype)
        shape = tuple(sizes[:ndim])
        is_whole = shape == tuple(shapes[source][:ndim])
        pieces[file].append(
            Piece(
                name=name,
                offsets=None if is_whole else tuple(offsets[:ndim]),
                code=code,
                shape=shape,
                start=start,
                nbytes=nbytes,
                data=_constant(box),
                splittable=has_viewable_memory(box),
            )
        )
    if ends != totals:
        raise _misfit(f"the chunks of the files end at {ends}, planned are {totals}", None)
    missing = [name for name in assignment.objects if name not in objects]
    if missing:
        raise _misfit("an object is assigned to this rank, which does not hold it", missing[0])
    return place_objects(
        pieces, [(name, objects[name], name in inline) for name in assignment.objects]
    )


def place_objects(
    pieces: Sequence[Sequence[Piece]], objects: Iterable[tuple[str, EncodedObject, bool]]
) -> RankLayout:
    """Put ``objects`` (name, bytes, may be inline) behind the tensors of the last file, where
    their changing sizes move nothing."""
    files = [list(inside) for inside in pieces]
    reports: list[ObjectReport] = []
    for name, encoded, may_be_inline in objects:
        nbytes = len(encoded.data)
        if (may_be_inline and nbytes <= INLINE_LIMIT) or nbytes == 0:
            reports.append(ObjectReport(name, encoded.pickled, encoded.data, 0, 0, nbytes))
            continue
        if not files:
            files.append([])
        last = files[-1]
        start = last[-1].start + last[-1].nbytes if last else 0
        reports.append(ObjectReport(name, encoded.pickled, None, len(files) - 1, start, nbytes))
        last.append(
            Piece(
                name=name,
                offsets=None,
                code=code_of(torch.uint8),
                shape=(nbytes,),
                start=start,
                nbytes=nbytes,
                data=_constant(memoryview(encoded.data)),
            )
        )
    return RankLayout(
        files=tuple(
            FileLayout(
                number=number,
                pieces=tuple(inside),
                data_bytes=inside[-1].start + inside[-1].nbytes if inside else 0,
            )
            for number, inside in enumerate(files)
        ),
        objects=tuple(reports),
        chunks=sum(len(inside) for inside in pieces),
    )


def _constant(value: torch.Tensor | memoryview) -> Callable[[], torch.Tensor | memoryview]:
    return lambda: value


def _misfit(message: str, name: str | None) -> InvalidPlanError:
    return InvalidPlanError(
        f"the plan does not fit this rank's state: {message}",
        kind="results_mismatch",
        tensor=name,
        hint="nothing was committed; this is an error of the engine, please report it",
    )
