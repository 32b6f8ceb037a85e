"""Load plans against a brute-force oracle, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.errors import DamagedCheckpointError, StateMismatchError
from dcp_engine.format.dtypes import code_of, info
from dcp_engine.planning.load_plan import LoadSource, make_load_columns, unexpected_keys
from dcp_engine.state.values import Box, EntryKind, TensorValue
from tests.planning.layouts import content, part, per_rank, replicated, tensor


def stored(
    name: str,
    shape: Sequence[int],
    boxes: Sequence[Box],
    *,
    file: int = 0,
    begin: int = 0,
    dtype: torch.dtype = torch.float32,
    alias_of: str | None = None,
) -> Any:
    """A ``StoredTensor`` look-alike whose chunks lie one behind the other from ``begin`` on."""
    sizes = np.array([b.sizes for b in boxes], np.int64).reshape(len(boxes), len(shape))
    nbytes = sizes.prod(axis=1) * dtype.itemsize
    return SimpleNamespace(
        name=name,
        info=info(code_of(dtype)),
        dtype=dtype,
        shape=tuple(shape),
        alias_of=alias_of,
        shares_bytes=False,
        chunks=SimpleNamespace(
            offsets=np.array([b.offsets for b in boxes], np.int64).reshape(len(boxes), len(shape)),
            sizes=sizes,
            file=np.full(len(boxes), file, np.int32),
            start=begin + np.cumsum(nbytes) - nbytes,
            nbytes=nbytes,
        ),
    )


def manifest(
    tensors: Sequence[Any] = (),
    *,
    per_rank_tensors: Mapping[str, Mapping[int, Any]] | None = None,
    objects: Sequence[str] = (),
    world_size: int = 2,
) -> Any:
    return SimpleNamespace(
        world_size=world_size,
        tensors={t.name: t for t in tensors},
        per_rank_tensors=per_rank_tensors or {},
        objects=dict.fromkeys(objects),
        per_rank_objects={},
    )


def whole(shape: Sequence[int]) -> Box:
    return Box(offsets=(0,) * len(shape), sizes=tuple(shape))


def carry_out(plan: LoadSource, sources: Mapping[str, torch.Tensor]) -> None:
    """Copy as the plan says, chunk by chunk out of the global tensors."""
    columns = plan.columns
    positions = []
    for row in range(len(columns.dest)):
        name = columns.names[int(columns.tensor[row])]
        ndim = int(columns.ndims[row])
        chunk_at = columns.chunk_offsets[row, :ndim].tolist()
        chunk_sizes = columns.chunk_sizes[row, :ndim].tolist()
        within = columns.within[row, :ndim].tolist()
        lengths = columns.lengths[row, :ndim].tolist()
        dest_at = columns.dest_within[row, :ndim].tolist()
        chunk = sources[name][
            tuple(slice(o, o + s) for o, s in zip(chunk_at, chunk_sizes, strict=True))
        ]
        piece = chunk[tuple(slice(w, w + n) for w, n in zip(within, lengths, strict=True))]
        assert list(piece.shape) == lengths
        target = plan.tensors[int(columns.dest[row])]
        target[tuple(slice(d, d + n) for d, n in zip(dest_at, lengths, strict=True))] += piece
        first = 0
        for size, w in zip(chunk_sizes, within, strict=True):
            first = first * size + w
        begin = int(columns.chunk_start[row]) + first * int(columns.itemsize[row])
        positions.append((int(columns.file[row]), begin))
    assert positions == sorted(positions), "reads go by file and position"


@st.composite
def reshardings(draw: st.DrawFn) -> tuple[list[Any], list[TensorValue], dict[str, torch.Tensor]]:
    tensors, wanted, sources = [], [], {}
    for number in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(1, 7), max_size=3))
        dims: list[int | None] = [None, *range(len(shape))]

        def grid(shape: list[int] = shape, dims: list[int | None] = dims) -> list[Box]:
            mesh = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
            cuts = [draw(st.sampled_from(dims)) for _ in mesh]
            places = range(int(np.prod(mesh)))
            boxes = dict.fromkeys(part(shape, mesh, cuts, at) for at in places)
            return [box for box in boxes if 0 not in box.sizes]

        name = f"t{number}"
        boxes = draw(st.permutations(grid()))
        tensors.append(stored(name, shape, boxes, file=number % 2, begin=number << 20))
        sources[name] = content(shape, torch.float32) + 1
        wanted.append(tensor(name, shape, draw(st.lists(st.sampled_from(grid()), max_size=12))))
    return tensors, wanted, sources


@settings(max_examples=120, deadline=None)
@given(reshardings())
def test_what_is_read_is_what_was_wanted(
    case: tuple[list[Any], list[TensorValue], dict[str, torch.Tensor]],
) -> None:
    tensors, wanted, sources = case
    for value in wanted:
        for memory in value.tensors:
            memory.zero_()
    copies = [
        tensor_ for value in wanted for tensor_ in (torch.zeros(b.sizes) for b in value.boxes)
    ]
    plan = make_load_columns(wanted, manifest(tensors), rank=0, world_size=2)
    plan = LoadSource(columns=plan.columns, tensors=tuple(copies), lists=(), missing=(), skipped=())
    carry_out(plan, sources)
    expected = [
        sources[value.fqn][
            tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
        ]
        for value in wanted
        for box in value.boxes
    ]
    for got, want in zip(copies, expected, strict=True):
        assert torch.equal(got, want), "each element is copied once, from its place"
    # Brute force: the pairs of wanted box and chunk that share an element.
    pairs = sum(
        all(
            a < d + e and d < a + b
            for a, b, d, e in zip(box.offsets, box.sizes, offset, size, strict=True)
        )
        for value, kept in zip(wanted, tensors, strict=True)
        for box, (offset, size) in itertools.product(
            value.boxes,
            list(zip(kept.chunks.offsets.tolist(), kept.chunks.sizes.tolist(), strict=True)),
        )
    )
    assert len(plan.columns.dest) == pairs


def test_destinations_keep_the_order_of_the_wanted_boxes() -> None:
    value = replicated("w", (4,))
    plan = make_load_columns(
        [value], manifest([stored("w", (4,), [whole((4,))])]), rank=0, world_size=2
    )
    assert plan.tensors[0] is value.tensors[0]


@pytest.mark.parametrize(
    ("value", "held", "kind"),
    [
        (replicated("w", (4,)), [], "missing_key"),
        (replicated("w", (4,)), [stored("w", (5,), [whole((5,))])], "shape_mismatch"),
        (replicated("w", (4,)), [stored("w", (4, 1), [whole((4, 1))])], "shape_mismatch"),
        (
            replicated("w", (4,)),
            [stored("w", (4,), [whole((4,))], dtype=torch.float64)],
            "dtype_mismatch",
        ),
    ],
)
def test_mismatches(value: TensorValue, held: list[Any], kind: str) -> None:
    with pytest.raises(StateMismatchError) as caught:
        make_load_columns([value], manifest(held), rank=0, world_size=2)
    assert caught.value.kind == kind
    assert caught.value.tensor == "w"


def test_an_object_in_place_of_a_tensor_is_refused_even_if_not_strict() -> None:
    with pytest.raises(StateMismatchError) as caught:
        make_load_columns(
            [replicated("w", (4,))], manifest(objects=["w"]), rank=0, world_size=2, strict=False
        )
    assert caught.value.kind == "type_mismatch"


def test_partial_load_reports_what_is_missing_and_unexpected() -> None:
    held = manifest(
        [stored("a", (2,), [whole((2,))]), stored("b", (2,), [whole((2,))])], objects=["o"]
    )
    values = [replicated("a", (2,)), replicated("c", (2,))]
    plan = make_load_columns(values, held, rank=0, world_size=2, strict=False)
    assert plan.missing == ("c",)
    assert plan.columns.names == ("a",)
    assert unexpected_keys(held, ["a", "c"]) == ("b", "o")


def test_chunks_that_do_not_cover_are_damage() -> None:
    held = manifest([stored("w", (4,), [Box(offsets=(0,), sizes=(3,))])])
    with pytest.raises(DamagedCheckpointError, match="cover"):
        make_load_columns([replicated("w", (4,))], held, rank=0, world_size=2)


def rng(world_size: int = 2) -> Any:
    by_rank = {r: stored("rng", (r + 1,), [whole((r + 1,))], file=r) for r in range(world_size)}
    return manifest(per_rank_tensors={"rng": by_rank}, world_size=world_size)


def test_per_rank_values_go_to_their_own_rank() -> None:
    for rank in range(2):
        value = per_rank("rng", (rank + 1,))
        plan = make_load_columns([value], rng(), rank=rank, world_size=2)
        assert plan.columns.file.tolist() == [rank]
        assert plan.tensors == value.tensors


def test_per_rank_values_of_another_world_size() -> None:
    value = per_rank("rng", (1,))
    with pytest.raises(StateMismatchError) as caught:
        make_load_columns([value], rng(), rank=0, world_size=3)
    assert caught.value.kind == "world_size_mismatch"
    skipped = make_load_columns([value], rng(), rank=0, world_size=3, per_rank="skip")
    assert skipped.skipped == ("rng",)
    assert skipped.tensors == ()
    listed = make_load_columns([value], rng(), rank=0, world_size=3, per_rank="list")
    name, tensors = listed.lists[0]
    assert name == "rng"
    assert [tuple(t.shape) for t in tensors] == [(1,), (2,)]
    assert listed.columns.file.tolist() == [0, 1]
    assert all(a is b for a, b in zip(listed.tensors, tensors, strict=True))


def test_a_shared_value_serves_a_per_rank_destination() -> None:
    held = manifest([stored("rng", (2,), [whole((2,))])])
    plan = make_load_columns([per_rank("rng", (2,))], held, rank=1, world_size=5)
    assert len(plan.columns.dest) == 1


def test_nothing_wanted() -> None:
    plan = make_load_columns(
        [tensor("w", (4,), [])], manifest([stored("w", (4,), [whole((4,))])]), rank=0, world_size=2
    )
    assert len(plan.columns.dest) == 0
    assert plan.columns.within.shape == (0, 1)
    assert EntryKind.SHARDED == 1


@pytest.mark.parametrize("begin", [0, 4, 12])
def test_bytes_that_two_chunks_claim_are_refused(begin: int) -> None:
    def read(alias_of: str | None) -> LoadSource:
        held = manifest(
            [
                stored("a", (4,), [whole((4,))]),
                stored("b", (4,), [whole((4,))], begin=begin, alias_of=alias_of),
                stored("c", (4,), [whole((4,))], begin=begin, file=1),
            ]
        )
        wanted = [replicated(name, (4,)) for name in "abc"]
        return make_load_columns(wanted, held, rank=0, world_size=2)

    with pytest.raises(DamagedCheckpointError) as caught:
        read(None)
    assert (caught.value.kind, caught.value.tensor) == ("chunks_overlap", "a")
    assert "'b'" in str(caught.value)
    assert read("a").columns.names == ("a", "b", "c")


def test_one_tensor_s_chunks_may_not_share_bytes_either() -> None:
    held = stored("a", (4,), [Box(offsets=(0,), sizes=(2,)), Box(offsets=(2,), sizes=(2,))])
    held.chunks.start[1] = 0
    with pytest.raises(DamagedCheckpointError, match="'a' and 'a' claim the same bytes"):
        make_load_columns([replicated("a", (4,))], manifest([held]), rank=0, world_size=2)
