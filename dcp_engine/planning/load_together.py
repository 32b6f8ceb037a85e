"""What is wanted of many tensors, planned for all of them at once.

Belongs here: the tensors that nearly all are: stored whole or in a few chunks, of the dtype and
shape that are wanted. Does not belong here: all others, which are planned, or refused, one by one
(``load_plan``): what does not pass here is handed back without a word.

One by one a tensor takes 60 us, of which no more than a few are for its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from dcp_engine.format.dtypes import code_of, info, is_known
from dcp_engine.format.lazy_maps import TensorMap
from dcp_engine.format.manifest import Manifest
from dcp_engine.format.tensor_section import TiledTensors, WholeTensors
from dcp_engine.geometry.boxes import find_overlaps
from dcp_engine.planning.arrays import all_rows, pad_columns, padded_rows
from dcp_engine.planning.columns import I64
from dcp_engine.planning.load_parts import LoadParts, Overlaps, cut_overlaps, uncovered
from dcp_engine.state.values import TensorValue

__all__ = ["plan_together"]

Bool = npt.NDArray[np.bool_]


def plan_together(
    wanted: Sequence[TensorValue], manifest: Manifest, parts: LoadParts
) -> Sequence[TensorValue]:
    """Plan what can be planned together; returns the others, in their order."""
    if not isinstance(manifest.tensors, TensorMap):
        return wanted
    rest = _add_whole_tensors(wanted, manifest.tensors, parts)
    return _add_tiled_tensors(rest, manifest.tensors, parts) if rest else rest


def _add_whole_tensors(
    wanted: Sequence[TensorValue], tensors: TensorMap, parts: LoadParts
) -> Sequence[TensorValue]:
    """Plan what is wanted whole, stored in one chunk, and fits: what there may be a hundred
    thousand of, so without an object for each. Returns the others."""
    stored = tensors.whole([value.fqn for value in wanted])
    # Most are ``wanted`` itself, all of it.
    found = wanted if len(stored.at) == len(wanted) else [wanted[at] for at in stored.at.tolist()]
    fits = _fitting(found, stored)
    fits &= np.array(
        [len(v.boxes) == 1 and v.boxes[0].sizes == v.shape for v in found],
        np.bool_,
    )
    rows = np.flatnonzero(fits)
    if not len(rows):
        return wanted
    if len(rows) < len(found):
        found = [found[row] for row in rows.tolist()]
    ndims = stored.ndims[rows]
    sizes = stored.shapes[rows, : int(ndims.max(initial=1))]
    zeros = np.zeros_like(sizes)
    first = len(parts.destinations)
    parts.destinations.extend([value.tensors[0] for value in found])
    parts.add_overlaps(
        [value.fqn for value in found],
        ndims.tolist(),
        _itemsizes(stored.dtypes[rows]),
        [1] * len(rows),
        np.arange(first, first + len(rows)),
        Overlaps(
            file=stored.file[rows],
            start=stored.start[rows],
            chunk_offsets=zeros,
            chunk_sizes=sizes,
            within=zeros,
            lengths=sizes,
            dest_within=zeros,
        ),
    )
    if len(rows) == len(wanted):
        return ()
    return _without(wanted, stored.at[rows])


def _add_tiled_tensors(
    wanted: Sequence[TensorValue], tensors: TensorMap, parts: LoadParts
) -> Sequence[TensorValue]:
    """The same for what is stored in a few chunks, or wanted in parts."""
    done = [
        stored.at[_add_tiled(wanted, stored, parts)]
        for stored in tensors.tiled([value.fqn for value in wanted])
    ]
    return _without(wanted, np.concatenate([np.zeros(0, np.int64), *done]))


def _add_tiled(wanted: Sequence[TensorValue], stored: TiledTensors, parts: LoadParts) -> I64:
    """Plan what fits of ``stored``; returns which rows do."""
    found = [wanted[at] for at in stored.at.tolist()]
    fits = _fitting(found, stored)
    boxes = [value.boxes if fit else () for value, fit in zip(found, fits.tolist(), strict=True)]
    held = np.fromiter(map(len, boxes), np.int64, len(boxes))
    each = list(chain.from_iterable(boxes))
    width = stored.offsets.shape[1]
    offsets = padded_rows([box.offsets for box in each], width, 0)
    sizes = padded_rows([box.sizes for box in each], width, 1)
    of_box = np.repeat(np.arange(len(found)), held)
    pairs = find_overlaps(
        offsets,
        sizes,
        stored.offsets,
        stored.sizes,
        wanted_tensor=of_box,
        stored_tensor=np.repeat(np.arange(len(found)), stored.counts),
    )
    overlaps = cut_overlaps(pairs, offsets, sizes, stored)
    short = uncovered(pairs[0], overlaps, sizes)
    if short.any():
        fits[of_box[short]] = False
        kept = fits[of_box[pairs[0]]]
        pairs = pairs[0][kept], pairs[1][kept]
        overlaps = cut_overlaps(pairs, offsets, sizes, stored)
    rows = np.flatnonzero(fits)
    chosen = rows.tolist()
    used = fits[of_box]
    dest = np.cumsum(used) - 1 + len(parts.destinations)
    parts.destinations.extend(chain.from_iterable(found[row].tensors for row in chosen))
    parts.add_overlaps(
        [found[row].fqn for row in chosen],
        stored.ndims[rows].tolist(),
        _itemsizes(stored.dtypes[rows]),
        np.bincount(of_box[pairs[0]], minlength=len(found))[rows].tolist(),
        dest[pairs[0]],
        overlaps,
    )
    return rows


def _fitting(found: Sequence[TensorValue], stored: WholeTensors | TiledTensors) -> Bool:
    """(n,) which of ``found`` are of the dtype and shape that is stored."""
    shapes = [value.shape for value in found]
    dtypes = [value.dtype for value in found]
    codes = {dtype: code_of(dtype) if is_known(dtype) else -1 for dtype in set(dtypes)}
    ndims = np.fromiter(map(len, shapes), np.int64, len(found))
    width = max(stored.shapes.shape[1], int(ndims.max(initial=0)))
    stored_shapes = pad_columns(stored.shapes, width, 1)
    fits: Bool = np.fromiter(map(codes.__getitem__, dtypes), np.int64, len(found)) == stored.dtypes
    fits &= (ndims == stored.ndims) & all_rows(padded_rows(shapes, width, 1) == stored_shapes)
    return fits


def _itemsizes(codes: I64) -> list[int]:
    values = codes.tolist()
    known = {code: info(code).itemsize for code in set(values)}
    return [known[code] for code in values]


def _without(wanted: Sequence[TensorValue], done: I64) -> Sequence[TensorValue]:
    rest = np.ones(len(wanted), np.bool_)
    rest[done] = False
    return [wanted[at] for at in np.flatnonzero(rest).tolist()]
