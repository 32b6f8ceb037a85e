"""Objects as bytes: a tagged encoding that is safe to read, and ``torch.save`` for the rest.

Belongs here: which values have a tagged encoding, and the choice between the two. The encoding
itself is in ``tagged``. Does not belong here: where the bytes are kept.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from dataclasses import dataclass

import torch

from dcp_engine.errors import (
    CheckpointError,
    DamagedCheckpointError,
    UnsafeContentError,
    UnsupportedStateError,
)
from dcp_engine.format import tagged

__all__ = ["EncodedObject", "decode_object", "encode_object"]

# In what torch says of a pickle that it refuses.
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
_NOT_ALLOWED = re.compile(r"GLOBAL ([\w.]{1,200}) was not an allowed global")
_REASON = re.compile(r"(?:WeightsUnpickler error:\s*|(?=Trying to load ))(\S.*)")


@dataclass(frozen=True, slots=True)
class EncodedObject:
    """An object as it is stored."""

    data: bytes
    pickled: bool
    """Whether ``torch.save`` made the bytes; else they are in the tagged encoding."""


def encode_object(value: object, *, fqn: str) -> EncodedObject:
    """Encode ``value``: tagged if that restores it exactly, else with ``torch.save``.

    The tagged encoding of equal values is the same bytes. Raises ``UnsupportedStateError``,
    naming ``fqn``, for what cannot be pickled either.
    """
    try:
        return EncodedObject(tagged.encode(value), pickled=False)
    except tagged.NotTaggable:
        pass
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except Exception as error:
        raise UnsupportedStateError(
            f"a {type(value).__qualname__} cannot be pickled: {type(error).__name__}: {error}",
            tensor=fqn,
            hint="leave it out of the state dict, or give it a state_dict and load_state_dict",
        ) from error
    return EncodedObject(buffer.getvalue(), pickled=True)


def decode_object(
    data: bytes,
    pickled: bool,
    *,
    fqn: str,
    checkpoint: object | None = None,
    allow_pickle: bool = False,
) -> object:
    """The value that ``data`` encodes.

    What ``torch.save`` made is read with ``weights_only=True``, and executed only with
    ``allow_pickle``. Raises ``UnsafeContentError`` (``pickle_refused``) for what would run code,
    and ``DamagedCheckpointError`` (``object_invalid``) for bytes that encode nothing.
    """
    try:
        return _unpickle(data, allow_pickle) if pickled else tagged.decode(data)
    except CheckpointError as error:
        raise error.with_context(checkpoint=checkpoint, tensor=fqn) from error.__cause__


def _unpickle(data: bytes, allow_pickle: bool) -> object:
    _check_archive(data)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            raise _refused(error) from error
    except Exception as error:
        if not allow_pickle:
            raise _damaged(error) from error
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    except Exception as error:
        raise _damaged(error) from error


def _check_archive(data: bytes) -> None:
    """``torch.save`` stores the records of its archive as they are. One that is compressed, or
    records that share their bytes, could unpack to any size."""
    if not data.startswith(b"PK"):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
    except Exception as error:
        raise _damaged(error) from error
    if sum(record.file_size for record in records) > len(data):
        raise DamagedCheckpointError(
            "the pickled object is an archive that unpacks to more than its size",
            kind="object_invalid",
        )


def _damaged(error: Exception) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"the pickled object cannot be restored: {type(error).__name__}: {_first_line(error)}",
        kind="object_invalid",
    )


def _refused(error: pickle.UnpicklingError) -> UnsafeContentError:
    """What torch's safe reader met; its advice is about ``torch.load``, so it is left out."""
    text = _ESCAPE.sub("", str(error))
    hint = "if you trust whoever wrote the checkpoint, load with allow_pickle=True"
    if not_allowed := _NOT_ALLOWED.search(text):
        name = not_allowed[1]
        reason = f"it needs {name}"
        hint = f"if you trust {name}, load in torch.serialization.safe_globals([{name}]); {hint}"
    else:
        found = _REASON.search(text)
        line = _first_line(error) if found is None else found[1][:200]
        reason = "".join(letter if letter.isprintable() else "?" for letter in line)
    return UnsafeContentError(f"the object is a pickle that would run code: {reason}", hint=hint)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
