"""What one rank's data files will hold, byte by byte, before anything is written.

Belongs here: pure functions from an assignment (or a list of sized items) to files. Does not
belong here: writing them (``write_files``), and deciding who writes what (``planning``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dcp_engine.collector import collector_paused
from dcp_engine.errors import InvalidPlanError
from dcp_engine.format.dtypes import code_of
from dcp_engine.format.object_codec import EncodedObject
from dcp_engine.native_storage import ObjectReport
from dcp_engine.planning.arrays import all_rows, padded_rows
from dcp_engine.planning.columns import RankAssignment
from storage_backends.tensor_bytes import box_of

__all__ = [
    "INLINE_LIMIT",
    "Data",
    "FileLayout",
    "RankLayout",
    "lay_out_assignment",
    "place_objects",
]

INLINE_LIMIT = 4096
"""Bytes of an encoded object that may stand in the manifest itself."""

Data = torch.Tensor | memoryview | Callable[[], torch.Tensor]
"""A box (a strided tensor on any device), bytes, or what resolves to the box when its turn has
come."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FileLayout:
    """One data file: P pieces (chunks of tensors, and objects) in the order of their bytes, which
    follow each other without gaps. Columns, because there may be a million of them."""

    number: int
    names: list[str] = field(default_factory=list)
    """Fully qualified names."""
    offsets: list[tuple[int, ...] | None] = field(default_factory=list)
    """Where the box lies in the global tensor; None for a whole tensor, and for an object."""
    codes: list[int] = field(default_factory=list)
    """Dtypes, as ``format.dtypes`` numbers them."""
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Bytes."""
    data: list[Data] = field(default_factory=list)

    def add(
        self,
        name: str,
        offsets: tuple[int, ...] | None,
        code: int,
        shape: tuple[int, ...],
        nbytes: int,
        data: Data,
    ) -> None:
        """One more piece, behind the others."""
        self.names.append(name)
        self.offsets.append(offsets)
        self.codes.append(code)
        self.shapes.append(shape)
        self.sizes.append(nbytes)
        self.data.append(data)


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """All that one rank writes."""

    files: tuple[FileLayout, ...]
    objects: tuple[ObjectReport, ...]
    """Where each object is, the inline ones included."""
    chunks: int
    """Pieces that are tensors."""


@collector_paused()
def lay_out_assignment(
    assignment: RankAssignment,
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    tensors: Sequence[torch.Tensor],
    objects: Mapping[str, EncodedObject],
    inline: frozenset[str],
) -> RankLayout:
    """The files of ``assignment``; ``names``, ``shapes`` (global) and ``tensors`` are those of
    the rows that ``assignment.source`` refers to.

    Raises ``InvalidPlanError(kind="results_mismatch")`` when the assignment does not fit the
    tensors, or leaves gaps: it was made for another state than this.
    """
    _refuse_gaps(assignment, names)
    # List by list: there may be a hundred thousand chunks.
    sources = assignment.source.tolist()
    sizes = assignment.nbytes.tolist()
    chunk_names = [names[source] for source in sources]
    boxes = [tensors[source] for source in sources]
    if [box.nbytes for box in boxes] != sizes:
        _cut_boxes(boxes, assignment, chunk_names)
    dtypes = [box.dtype for box in boxes]
    codes = {dtype: code_of(dtype) for dtype in set(dtypes)}
    offsets, chunk_shapes = _places(assignment, [shapes[source] for source in sources], chunk_names)
    ends = np.searchsorted(assignment.file, np.arange(len(assignment.file_data_bytes)), "right")
    files: list[FileLayout] = []
    begin = 0
    for number, end in enumerate(ends.tolist()):
        rows = slice(begin, end)
        files.append(
            FileLayout(
                number=number,
                names=chunk_names[rows],
                offsets=offsets[rows],
                codes=[codes[dtype] for dtype in dtypes[rows]],
                shapes=chunk_shapes[rows],
                sizes=sizes[rows],
                data=list[Data](boxes[rows]),
            )
        )
        begin = end
    missing = [name for name in assignment.objects if name not in objects]
    if missing:
        raise _misfit("an object is assigned to this rank, which does not hold it", missing[0])
    return place_objects(
        files, [(name, objects[name], name in inline) for name in assignment.objects]
    )


def _cut_boxes(boxes: list[torch.Tensor], assignment: RankAssignment, names: Sequence[str]) -> None:
    """Of a tensor that is larger than its chunk, only the chunk."""
    for row, nbytes in enumerate(assignment.nbytes.tolist()):
        if boxes[row].nbytes != nbytes:
            box = box_of(
                boxes[row], assignment.within[row].tolist(), assignment.sizes[row].tolist()
            )
            if box.nbytes != nbytes:
                raise _misfit(
                    f"{nbytes} bytes are assigned to a box of {tuple(box.shape)}", names[row]
                )
            boxes[row] = box


def _places(
    assignment: RankAssignment, wholes: list[tuple[int, ...]], names: Sequence[str]
) -> tuple[list[tuple[int, ...] | None], list[tuple[int, ...]]]:
    """Where each chunk lies in its global tensor (None: it is all of it), and its shape."""
    width = assignment.sizes.shape[1]
    wide = [row for row, whole in enumerate(wholes) if len(whole) > width]
    if wide:
        raise _misfit(f"its chunks have {width} dimensions", names[wide[0]])
    offsets: list[tuple[int, ...] | None] = [None] * len(wholes)
    shapes = wholes
    is_part = ~all_rows(padded_rows(wholes, width, 1) == assignment.sizes)
    for row in np.flatnonzero(is_part).tolist():
        ndim = len(wholes[row])
        offsets[row] = tuple(assignment.offsets[row, :ndim].tolist())
        shapes[row] = tuple(assignment.sizes[row, :ndim].tolist())
    return offsets, shapes


def _refuse_gaps(assignment: RankAssignment, names: Sequence[str]) -> None:
    """The files follow each other, and the chunks of each from its begin to its planned end."""
    numbers = assignment.file
    if len(numbers) and (
        (np.diff(numbers) < 0).any() or int(numbers[-1]) >= len(assignment.file_data_bytes)
    ):
        raise _misfit("its chunks are not in the order of its files", None)
    for file, planned in enumerate(assignment.file_data_bytes.tolist()):
        rows = np.flatnonzero(assignment.file == file)
        nbytes = assignment.nbytes[rows]
        ends = np.cumsum(nbytes)
        wrong = np.flatnonzero(assignment.start[rows] != ends - nbytes)
        if len(wrong):
            row = rows[wrong[0]]
            raise _misfit(
                f"a chunk begins at {assignment.start[row]}, where no chunk before it ends",
                names[int(assignment.source[row])],
            )
        end = int(ends[-1]) if len(rows) else 0
        if end != planned:
            raise _misfit(f"the chunks of file {file} end at {end}, planned is {planned}", None)


def place_objects(
    files: list[FileLayout], objects: Iterable[tuple[str, EncodedObject, bool]]
) -> RankLayout:
    """Put ``objects`` (name, bytes, may be inline) behind the tensors of the last file, where
    their changing sizes move nothing. ``files`` get longer by it."""
    chunks = sum(len(file.names) for file in files)
    end = sum(files[-1].sizes) if files else 0
    code = code_of(torch.uint8)
    reports: list[ObjectReport] = []
    for name, encoded, may_be_inline in objects:
        nbytes = len(encoded.data)
        if (may_be_inline and nbytes <= INLINE_LIMIT) or nbytes == 0:
            reports.append(ObjectReport(name, encoded.pickled, encoded.data, 0, 0, nbytes))
            continue
        if not files:
            files.append(FileLayout(number=0))
        last = files[-1]
        reports.append(ObjectReport(name, encoded.pickled, None, last.number, end, nbytes))
        last.add(name, None, code, (nbytes,), nbytes, memoryview(encoded.data))
        end += nbytes
    return RankLayout(files=tuple(files), objects=tuple(reports), chunks=chunks)


def _misfit(message: str, name: str | None) -> InvalidPlanError:
    return InvalidPlanError(
        f"the plan does not fit this rank's state: {message}",
        kind="results_mismatch",
        tensor=name,
        hint="nothing was committed; this is an error of the engine, please report it",
    )
