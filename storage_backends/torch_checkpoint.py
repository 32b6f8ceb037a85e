"""Checkpoints of torch.distributed.checkpoint that lie where the engine reads or writes.

Belongs here: recognizing one, without unpickling it, and what is said of it. Does not belong here:
reading one.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress

from dcp_engine.errors import CheckpointError, NotFoundError
from dcp_engine.format.names import TORCH_METADATA_NAME
from dcp_engine.storage import ByteStore, ReadRange

__all__ = ["refuse_torch_checkpoint", "warn_of_torch_checkpoint"]

logger = logging.getLogger(__name__)

_HEAD_BYTES = 256
_OF_TORCH = re.compile(rb"torch\.distributed\.[\w.]*checkpoint")
"""The module of the pickled class, which stands at the begin of the file."""


def refuse_torch_checkpoint(store: ByteStore) -> None:
    """Raise ``NotFoundError`` if what lies at ``store`` is a checkpoint of torch's."""
    head = bytearray()
    # What cannot be read is not known to be one; that there is none of the engine's is said anyway.
    with suppress(CheckpointError, OSError, EOFError):
        # A directory of that name is listed by another, and is not read.
        for file in store.list(TORCH_METADATA_NAME):
            if file.name == TORCH_METADATA_NAME and file.size:
                head = bytearray(min(file.size, _HEAD_BYTES))
                store.read(file.name, [ReadRange(0, memoryview(head))])
    if _OF_TORCH.search(head) is not None:
        raise NotFoundError(
            "this is a checkpoint of torch.distributed.checkpoint, which dcp_engine does not read",
            checkpoint=store.url,
            hint="load it with torch.distributed.checkpoint.load, and save it with dcp_engine to "
            "another place",
        )


def warn_of_torch_checkpoint(store: ByteStore) -> None:
    """Log a warning if a save to ``store`` leaves a checkpoint of torch's beside its own. Local
    files only: elsewhere looking is a request, which every save would wait for."""
    path = store.local_path(TORCH_METADATA_NAME)
    head = b""
    # What cannot be read here is not going to be loaded by mistake either.
    with suppress(OSError):
        if path is not None and os.path.isfile(path):
            with open(path, "rb") as file:
                head = file.read(_HEAD_BYTES)
    if _OF_TORCH.search(head) is not None:
        logger.warning(
            "%s holds a checkpoint of torch.distributed.checkpoint, and that is what torch's load "
            "is going to find there, not what is saved now: remove its .metadata and *.distcp, or "
            "save to another place",
            store.url,
        )
