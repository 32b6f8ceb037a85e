"""Element types: their codes, names, sizes, and what safetensors calls them.

Belongs here: the fixed table. Codes and names stand in ``docs/format.md`` and never change;
a new dtype gets the next code. Quantized dtypes are missing on purpose: their tensors need a
scale and a zero point beside the bytes, so they are refused at save.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch

from dcp_engine.errors import DamagedCheckpointError, UnsupportedStateError

__all__ = ["DTYPES", "DTypeInfo", "by_name", "code_of", "info", "is_known", "stored_shape"]


@dataclass(frozen=True, slots=True)
class DTypeInfo:
    """One element type."""

    code: int
    """Its number in plans; fixed forever."""
    dtype: torch.dtype
    name: str
    """Its name in manifests: torch's, without ``torch.``."""
    safetensors: str | None
    """What safetensors calls it, or None where it has no name for it."""
    itemsize: int
    """Bytes per element (of torch's element: ``float4_e2m1fn_x2`` is one byte, two values)."""


# Position is the code: append only. (name, safetensors name, bytes). The sizes are written down
# and compared with torch's, so that a torch that changes its mind cannot change the format.
_TABLE: tuple[tuple[str, str | None, int], ...] = (
    ("bool", "BOOL", 1),
    ("uint8", "U8", 1),
    ("int8", "I8", 1),
    ("uint16", "U16", 2),
    ("int16", "I16", 2),
    ("uint32", "U32", 4),
    ("int32", "I32", 4),
    ("uint64", "U64", 8),
    ("int64", "I64", 8),
    ("float16", "F16", 2),
    ("bfloat16", "BF16", 2),
    ("float32", "F32", 4),
    ("float64", "F64", 8),
    ("complex32", None, 4),
    ("complex64", "C64", 8),
    ("complex128", None, 16),
    ("float8_e4m3fn", "F8_E4M3", 1),
    ("float8_e5m2", "F8_E5M2", 1),
    ("float8_e4m3fnuz", "F8_E4M3FNUZ", 1),
    ("float8_e5m2fnuz", "F8_E5M2FNUZ", 1),
    ("float8_e8m0fnu", "F8_E8M0", 1),
    ("float4_e2m1fn_x2", "F4", 1),
    ("bits8", None, 1),
    ("bits16", None, 2),
    ("bits1x8", None, 1),
    ("bits2x4", None, 1),
    ("bits4x2", None, 1),
    ("uint1", None, 1),
    ("uint2", None, 1),
    ("uint3", None, 1),
    ("uint4", None, 1),
    ("uint5", None, 1),
    ("uint6", None, 1),
    ("uint7", None, 1),
    ("int1", None, 1),
    ("int2", None, 1),
    ("int3", None, 1),
    ("int4", None, 1),
    ("int5", None, 1),
    ("int6", None, 1),
    ("int7", None, 1),
)


def _known_to_this_torch() -> dict[int, DTypeInfo]:
    table = {}
    for code, (name, safetensors, itemsize) in enumerate(_TABLE):
        dtype = getattr(torch, name, None)
        if isinstance(dtype, torch.dtype) and dtype.itemsize == itemsize:
            table[code] = DTypeInfo(code, dtype, name, safetensors, itemsize)
    return table


DTYPES = MappingProxyType(_known_to_this_torch())
"""By code, the dtypes that this torch has too."""
_BY_DTYPE = MappingProxyType({entry.dtype: entry for entry in DTYPES.values()})
_BY_NAME = MappingProxyType({entry.name: entry for entry in DTYPES.values()})
_NAMES = frozenset(name for name, _, _ in _TABLE)


def is_known(dtype: torch.dtype) -> bool:
    """Whether ``dtype`` has a code."""
    return dtype in _BY_DTYPE


def code_of(dtype: torch.dtype) -> int:
    """The code of ``dtype``. Raises ``UnsupportedStateError`` for one that cannot be stored."""
    entry = _BY_DTYPE.get(dtype)
    if entry is None:
        raise UnsupportedStateError(
            f"tensors of dtype {dtype} cannot be stored",
            hint="dequantize the tensor" if "qu" in str(dtype) or "qint" in str(dtype) else None,
        )
    return entry.code


def info(code: int) -> DTypeInfo:
    """The dtype of ``code``. Raises ``DamagedCheckpointError`` for a code that is none here."""
    entry = DTYPES.get(code)
    if entry is None:
        known = 0 <= code < len(_TABLE)
        raise DamagedCheckpointError(
            f"this torch has no dtype {_TABLE[code][0]}" if known else f"no dtype has code {code}",
            hint=f"install a newer torch than {torch.__version__}" if known else None,
        )
    return entry


def by_name(name: str) -> DTypeInfo:
    """The dtype called ``name``. Raises ``DamagedCheckpointError`` for a name that is none here."""
    entry = _BY_NAME.get(name)
    if entry is None:
        known = name in _NAMES
        raise DamagedCheckpointError(
            f"this torch has no dtype {name}" if known else f"there is no dtype {name[:80]!r}",
            hint=f"install a newer torch than {torch.__version__}" if known else None,
        )
    return entry


def stored_shape(entry: DTypeInfo, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The dtype name and shape under which a safetensors header lists a box of ``shape``.

    A dtype that safetensors has no name for is U8 with a trailing dimension of its bytes.
    ``float4_e2m1fn_x2`` counts its two values: the last dimension doubles (0-d becomes ``(2,)``).
    """
    if entry.safetensors is None:
        return "U8", (*shape, entry.itemsize)
    if entry.safetensors == "F4":
        return "F4", (*shape[:-1], shape[-1] * 2) if shape else (2,)
    return entry.safetensors, shape
