"""The plain strided memory behind a tensor, or a refusal by name.

Belongs here: what memory can be stored as it is and filled in place. Does not belong here: which
part of a global tensor it holds.
"""

from __future__ import annotations

import torch

from dcp_engine.errors import UnsupportedStateError
from dcp_engine.state.adapters.torch_types import (
    has_own_dispatch,
    is_async_collective,
    is_fake,
)

__all__ = ["as_integers", "fill", "is_simple", "plain_memory", "refusal"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_ORDINARY = frozenset({torch.Tensor, torch.nn.Parameter})
"""Exact types that need no look at their class: nearly all tensors there are."""

_COUNTED_ELEMENTS = 1 << 24
"""Larger tensors with interleaved strides are taken to share memory."""


def refusal(fqn: str, what: str, hint: str | None = None) -> UnsupportedStateError:
    """The error for a value that could not be loaded again."""
    return UnsupportedStateError(what, tensor=fqn, hint=hint)


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the same size, for copies: several dtypes (bits, integers of
    less than a byte) have no copy kernel. What has no integer of its size, and conjugate or
    negative views, whose bits are not their value, stay what they are."""
    dtype = _INTEGERS.get(tensor.element_size())
    if dtype is None or tensor.is_conj() or tensor.is_neg():
        return tensor
    return tensor.view(dtype)


def fill(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy ``source`` into the memory of ``target``, which may be anything that a load fills: of a
    dtype without copies, a leaf of autograd, made in inference mode.

    Both have one shape and dtype; ``source`` is no conjugate or negative view.
    """
    with torch.no_grad():
        target = as_integers(target.detach())
        target.copy_(source.view(target.dtype))


def plain_memory(fqn: str, tensor: torch.Tensor, *, for_load: bool) -> torch.Tensor:
    """``tensor`` as a plain ``torch.Tensor`` without autograd, sharing its memory.

    Conjugate and negative views are materialised, so that their memory is their value; that is a
    copy, which a save may store but a load must not fill.

    Raises:
        UnsupportedStateError: no memory that could be stored and restored (meta, sparse, mkldnn,
            quantized, nested strided, fake, a subclass with ``__torch_dispatch__``); with
            ``for_load`` also memory that cannot be filled element by element (conjugate or
            negative views, elements that share memory).
    """
    if type(tensor) in _ORDINARY and is_simple(tensor):  # nearly all are
        return tensor.detach() if tensor.requires_grad else tensor
    if type(tensor) not in _ORDINARY:
        if is_async_collective(tensor):
            tensor = tensor.trigger_wait()  # type: ignore[attr-defined]
        _refuse_strange_class(fqn, tensor)
    _refuse_without_memory(fqn, tensor)
    with torch._C.DisableTorchFunctionSubclass():
        plain = tensor.detach()
        if type(plain) is not torch.Tensor:
            plain = plain.as_subclass(torch.Tensor)
        _refuse_freed(fqn, plain)
        if for_load:
            _refuse_unfillable(fqn, plain)
        elif plain.is_conj() or plain.is_neg():
            plain = plain.resolve_conj().resolve_neg()
        return plain


def is_simple(tensor: torch.Tensor) -> bool:
    """Whether a tensor of an ordinary class passes all that ``plain_memory`` asks."""
    return (
        tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
        and tensor.storage_offset() * tensor.itemsize + tensor.nbytes
        <= tensor.untyped_storage().nbytes()
    )


def _refuse_strange_class(fqn: str, tensor: torch.Tensor) -> None:
    if torch.nn.parameter.is_lazy(tensor):
        raise refusal(
            fqn, "a lazy parameter without shape cannot be stored", "run the module once before"
        )
    if is_fake(tensor):
        raise refusal(fqn, "a fake tensor has no data", "save outside FakeTensorMode")
    if has_own_dispatch(tensor):
        raise refusal(
            fqn,
            f"a {type(tensor).__qualname__} defines __torch_dispatch__ but neither "
            "__tensor_flatten__ nor __create_write_items__, so its content is out of reach",
            "give the class one of them",
        )


def _refuse_without_memory(fqn: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise refusal(
            fqn, "a tensor on the meta device has no data", "materialise it, as with to_empty()"
        )
    if tensor.is_nested:
        raise refusal(
            fqn,
            "a nested tensor with strided layout cannot be restored",
            "store its components, as by unbind(), or use layout=torch.jagged",
        )
    if tensor.layout is not torch.strided:
        raise refusal(
            fqn,
            f"a tensor with layout {tensor.layout} cannot be restored",
            "store its indices and values, or to_dense()",
        )
    if tensor.is_quantized:
        raise refusal(
            fqn,
            "a quantized tensor cannot be restored",
            "store int_repr(), the scales and the zero points",
        )


def _refuse_freed(fqn: str, tensor: torch.Tensor) -> None:
    """Storages can be resized under their tensors; touching what is gone is a crash."""
    if not tensor.numel():
        return
    last = tensor.storage_offset()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        last += (size - 1) * stride
    if (last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise refusal(
            fqn,
            "the tensor's storage has been freed or made smaller than the tensor",
            "FSDP frees unsharded parameters: save the sharded state dict",
        )


def _refuse_unfillable(fqn: str, tensor: torch.Tensor) -> None:
    if tensor.is_conj() or tensor.is_neg():
        raise refusal(
            fqn,
            "a conjugate or negative view cannot be filled in place",
            "load into resolve_conj() or resolve_neg() of it",
        )
    if _elements_share_memory(tensor):
        raise refusal(
            fqn,
            f"elements of the destination share memory (shape {tuple(tensor.shape)}, strides "
            f"{tensor.stride()}), so it cannot be filled in place",
            "load into a contiguous() tensor",
        )


def _elements_share_memory(tensor: torch.Tensor) -> bool:
    if tensor.numel() < 2:
        return False
    dims = [(n, m) for n, m in zip(tensor.stride(), tensor.shape, strict=True) if m > 1]
    reach = 0
    for stride, size in sorted(dims):
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    if any(stride == 0 for stride, _ in dims) or tensor.numel() > _COUNTED_ELEMENTS:
        return True
    # Interleaved strides: rare enough to count the addresses one by one.
    addresses = torch.zeros((), dtype=torch.int64, device="cpu")
    for stride, size in dims:
        addresses = addresses.unsqueeze(-1) + torch.arange(size, device="cpu") * stride
    return int(torch.unique(addresses).numel()) < tensor.numel()
