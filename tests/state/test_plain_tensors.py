"""Plain tensors and objects: what is taken as it is, what is materialised, what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from dcp_engine.errors import UnsupportedStateError
from dcp_engine.state.adapters import GroupRanks, describe, describe_leaves
from dcp_engine.state.flatten import flatten
from dcp_engine.state.values import Box, EntryKind, ObjectValue, TensorValue

ALONE = GroupRanks(rank=3)


def one(value: Any, *, for_load: bool = False, kind: EntryKind = EntryKind.REPLICATED) -> Any:
    (result,) = describe("a.w", value, kind=kind, group=ALONE, for_load=for_load)
    return result


def refused(value: Any, match: str, *, for_load: bool = False) -> None:
    with pytest.raises(UnsupportedStateError, match=match) as info:
        one(value, for_load=for_load)
    assert info.value.kind == "unsupported_state"
    assert info.value.tensor == "a.w"
    assert info.value.rank == 3


DTYPES = sorted(
    {d for d in vars(torch).values() if isinstance(d, torch.dtype) and ".q" not in str(d)}, key=str
)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3, 4), (0, 4)], ids=str)
def test_every_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.empty(shape, dtype=dtype)
    for for_load in (False, True):
        value = one(tensor, for_load=for_load)
        assert isinstance(value, TensorValue)
        assert (value.fqn, value.kind) == ("a.w", EntryKind.REPLICATED)
        assert (value.dtype, value.shape, value.layout) == (dtype, shape, None)
        if 0 in shape:
            assert (value.boxes, value.tensors) == ((), ())
        else:
            assert value.boxes == (Box(offsets=(0,) * len(shape), sizes=shape),)
            assert value.tensors[0].data_ptr() == tensor.data_ptr()
            assert type(value.tensors[0]) is torch.Tensor


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0)[2:11:3],
        torch.arange(24.0).reshape(2, 3, 4)[:, 1],
        torch.arange(16.0).reshape(1, 2, 2, 4).to(memory_format=torch.channels_last),
        torch.nn.Parameter(torch.ones(3)),
        torch.nn.Buffer(torch.ones(3)),
        torch.ones(3, requires_grad=True),
        torch.as_strided(torch.arange(9.0), (2, 3), (3, 2)),
    ],
    ids=range(8),
)
def test_destinations_share_the_memory(tensor: torch.Tensor) -> None:
    value = one(tensor, for_load=True)
    (memory,) = value.tensors
    assert memory.stride() == tensor.stride()
    assert not memory.requires_grad
    assert value.requires_grad == tensor.requires_grad
    memory.copy_(torch.full(memory.shape, 7.0))
    assert (tensor == 7).all()


def test_views_are_not_their_whole_storage() -> None:
    (memory,) = one(torch.zeros(1000)[10:20]).tensors
    assert memory.numel() == 10


class Tagged(torch.Tensor):
    """A subclass without dispatch of its own: its memory is its content."""


def test_harmless_subclasses_are_plain() -> None:
    tensor = torch.ones(3).as_subclass(Tagged)
    (memory,) = one(tensor, for_load=True).tensors
    assert type(memory) is torch.Tensor
    memory.fill_(2)
    assert tensor.sum() == 6


class Watched(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("detach", "as_subclass"):
            raise AssertionError("the subclass must not be asked")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_torch_function_is_not_asked() -> None:
    (memory,) = one(torch.ones(3).as_subclass(Watched)).tensors
    assert type(memory) is torch.Tensor


def test_conjugate_and_negative_views_are_stored_by_value_and_not_filled() -> None:
    base = torch.tensor([1 + 2j, 3 - 4j])
    conj, neg = base.conj(), base.conj().imag
    assert neg.is_neg()
    (memory,) = one(conj).tensors
    assert memory.view(torch.float32).tolist() == [1.0, -2.0, 3.0, 4.0]
    (memory,) = one(neg).tensors
    assert memory.tolist() == [-2.0, 4.0]
    assert not memory.is_neg()
    refused(conj, "in place", for_load=True)
    refused(neg, "in place", for_load=True)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1, 3).expand(4, 3),
        torch.arange(5.0).unfold(0, 3, 1),
        torch.as_strided(torch.arange(9.0), (3, 3), (1, 2)),
        torch.as_strided(torch.arange(9.0), (3, 1, 3), (2, 0, 1)),
    ],
    ids=["expanded", "unfolded", "interleaved", "overlapping rows"],
)
def test_elements_that_share_memory_are_stored_but_not_filled(tensor: torch.Tensor) -> None:
    assert torch.equal(one(tensor).tensors[0], tensor)
    refused(tensor, "share memory", for_load=True)


def test_interleaved_strides_that_do_not_collide_can_be_filled() -> None:
    tensor = torch.as_strided(torch.zeros(9), (2, 3), (3, 2))
    one(tensor, for_load=True).tensors[0].copy_(torch.arange(6.0).reshape(2, 3))
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_huge_expanded_destination_is_refused_without_counting() -> None:
    refused(torch.ones(1).expand(1 << 50), "share memory", for_load=True)


def freed(keep: int) -> torch.Tensor:
    tensor = torch.ones(8)[4:]
    tensor.untyped_storage().resize_(keep)
    return tensor


def test_a_storage_that_just_suffices_is_not_refused() -> None:
    assert one(freed(32)).tensors[0].numel() == 4


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def compressed(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        blocks = (1, 1) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
        return torch.eye(4).to_sparse(layout=layout, blocksize=blocks)


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def fake() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3)


class Opaque(torch.Tensor):
    """A wrapper that does not say what it wraps."""

    @staticmethod
    def __new__(cls) -> Opaque:
        return torch.Tensor._make_wrapper_subclass(cls, (3,))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


@pytest.mark.parametrize("for_load", [False, True])
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: torch.empty(3, device="meta"), "meta device"),
        (lambda: torch.nn.Parameter(torch.empty(0, device="meta")), "meta device"),
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: compressed(torch.sparse_csr), "sparse_csr"),
        (lambda: compressed(torch.sparse_csc), "sparse_csc"),
        (lambda: compressed(torch.sparse_bsr), "sparse_bsr"),
        (lambda: compressed(torch.sparse_bsc), "sparse_bsc"),
        (lambda: torch.ones(3).to_mkldnn(), "mkldnn"),
        (quantized, "quantized"),
        (nested, "nested"),
        (fake, "fake"),
        (lambda: freed(0), "freed"),
        (lambda: freed(31), "freed"),
        (torch.nn.UninitializedParameter, "lazy"),
        (Opaque, "Opaque"),
    ],
)
def test_what_cannot_be_restored_is_refused(make: Any, match: str, for_load: bool) -> None:
    refused(make(), match, for_load=for_load)


@pytest.mark.parametrize(
    "value", [1, "text", None, [1, 2], {}, torch.float32, torch.Size([2]), torch.Tensor, object()]
)
@pytest.mark.parametrize("kind", [EntryKind.REPLICATED, EntryKind.PER_RANK])
def test_everything_else_is_an_object(value: Any, kind: EntryKind) -> None:
    result = one(value, kind=kind)
    assert result == ObjectValue(fqn="a.w", kind=kind, value=value)


def test_per_rank_tensors_are_marked() -> None:
    assert one(torch.ones(2), kind=EntryKind.PER_RANK).kind is EntryKind.PER_RANK


def test_leaves_are_described_in_order_with_their_kind() -> None:
    from dcp_engine.state.per_rank import PerRank

    flat = flatten({"a": torch.ones(1), "b": PerRank({"c": torch.ones(1), "d": 1}), "e": 2})
    described = describe_leaves(flat.leaves, group=ALONE)
    assert [leaf.fqn for leaf, _ in described] == ["a", "b.c", "b.d", "e"]
    assert [value.kind for _, values in described for value in values] == [
        EntryKind.REPLICATED,
        EntryKind.PER_RANK,
        EntryKind.PER_RANK,
        EntryKind.REPLICATED,
    ]
