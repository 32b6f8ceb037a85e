"""Where tensors lie in an arena."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.errors import UnsupportedStateError, UsageError
from dcp_engine.staging.arena import Arena
from dcp_engine.staging.layout import SMALL, ArenaLayout, make_layout
from tests.staging.states import numbered


def check(layout: ArenaLayout, tensors: list[torch.Tensor]) -> None:
    assert len(layout) == len(tensors)
    assert layout.nbytes.tolist() == [t.numel() * t.element_size() for t in tensors]
    begins, sizes = layout.offsets[layout.distinct], layout.nbytes[layout.distinct]
    ends = begins + sizes
    assert (begins[1:] >= ends[:-1]).all()
    assert layout.size == (int(ends[-1]) if len(ends) else 0)
    assert (begins % 64 == 0).all()
    assert (begins[sizes >= SMALL] % 4096 == 0).all()
    assert layout.size <= int((-(-sizes // 64) * 64).sum()) + 4096 * (
        1 + int((sizes >= SMALL).sum())
    )
    places = set(begins.tolist())
    assert all(o in places for o, n in zip(layout.offsets, layout.nbytes, strict=True) if n)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from([0, 1, 2, 3, 17, 70]), max_size=3),
            st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.complex128]),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_no_two_overlap(drawn: list[tuple[list[int], torch.dtype, bool]]) -> None:
    tensors: list[torch.Tensor] = []
    for shape, dtype, again in drawn:
        tensors.append(torch.empty(shape, dtype=dtype))
        if again:
            tensors.append(tensors[-1].view(tensors[-1].shape))
    layout = make_layout(tensors)
    check(layout, tensors)
    with Arena() as arena:
        arena.reserve(layout.size)
        for view, tensor in zip(layout.views(arena), tensors, strict=True):
            assert (view.shape, view.dtype) == (tensor.shape, tensor.dtype)
            assert view.is_contiguous()


def test_a_view_costs_its_own_bytes() -> None:
    whole = torch.empty(1 << 24)
    layout = make_layout([whole[100:110], whole.view(4096, 4096)[:2, :3]])
    assert layout.copied_bytes == 64
    assert layout.size <= 128


def test_the_same_memory_has_one_place() -> None:
    a = numbered(4, 6)
    same = [
        a,
        a.view(6, 4),
        a.T,
        a.T.view(6, 4),
        a.detach(),
        torch.nn.Parameter(a),
        a.view(1, 4, 6),
    ]
    layout = make_layout(same)
    rows = layout.offsets.tolist()
    assert rows[0] == rows[1] == rows[4] == rows[5] == rows[6]
    assert rows[2] == rows[3] != rows[0]
    assert len(layout.distinct) == 2
    # The same address, but other bytes.
    assert len(make_layout([a, a[:2], a[:, :2], a[:, :3]]).distinct) == 4
    # Other dtypes of the same bytes are the same bytes.
    assert len(make_layout([a, a.view(torch.int32)]).distinct) == 1


def test_empty_tensors_cost_nothing() -> None:
    layout = make_layout([torch.empty(0, 5), torch.empty(2, 0)])
    assert (layout.size, len(layout.distinct), layout.copied_bytes) == (0, 0, 0)
    with Arena() as arena:
        assert [tuple(view.shape) for view in layout.views(arena)] == [(0, 5), (2, 0)]
    assert make_layout([]).size == 0


def test_small_ones_lie_together_before_large_ones() -> None:
    tensors = [
        torch.empty(SMALL, dtype=torch.uint8),
        torch.empty(3),
        torch.empty(1 << 20),
        numbered(5),
    ]
    layout = make_layout(tensors)
    check(layout, tensors)
    assert layout.distinct.tolist() == [1, 3, 0, 2]
    assert layout.offsets.tolist() == [4096, 0, 4096 + SMALL, 64]


def test_many_are_columns() -> None:
    tensors = [torch.empty(256) for _ in range(20_000)]
    layout = make_layout(tensors)
    assert layout.size == 20_000 * 1024
    assert len(pickle.dumps(layout)) < 20_000 * 40


def test_layouts_of_the_same_structure_are_equal_in_any_process() -> None:
    def tensors(n: int = 3) -> list[torch.Tensor]:
        a = numbered(n)
        return [a, numbered(2, 2), a]

    layout = make_layout(tensors())
    assert layout.fingerprint() == make_layout(tensors()).fingerprint()
    copied: ArenaLayout = pickle.loads(pickle.dumps(layout))
    assert layout.fingerprint() == copied.fingerprint()
    np.testing.assert_array_equal(layout.offsets, copied.offsets)
    others = [tensors(4), tensors()[:2], [numbered(3), numbered(2, 2), numbered(3)]]
    others.append([t.view(torch.int32) for t in tensors()])
    for other in others:
        assert layout.fingerprint() != make_layout(other).fingerprint()


# Torch itself says that they will be gone.
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_refusals() -> None:
    complex_ = torch.ones(2, dtype=torch.complex64)
    for view in (complex_.conj(), complex_.conj().imag):
        with pytest.raises(UsageError, match="conjugate"):
            make_layout([view])
    with pytest.raises(UnsupportedStateError, match="qint8"):
        make_layout([torch._empty_affine_quantized((2,), dtype=torch.qint8)])
