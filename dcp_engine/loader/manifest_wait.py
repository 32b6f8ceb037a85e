"""Every rank reads the manifest that the coordinator announced, from the medium.

On a network file system a rank may see the previous manifest, or none, for a while (NFS caches
attributes for seconds), so another one than announced is looked at again for some time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from dcp_engine.coordination.interface import Operation
from dcp_engine.errors import CheckpointError
from dcp_engine.format.manifest import Manifest
from dcp_engine.native_storage import ColumnarReader, CommitRecord

__all__ = ["PATIENCE_S", "wait_for_manifest"]

PATIENCE_S = 60.0
"""NFS clients cache attributes of files for 60 s at most (acregmax), and so does the retry."""
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0


def wait_for_manifest(
    operation: Operation,
    reader: ColumnarReader,
    checkpoint_id: str | None,
    record: CommitRecord,
    *,
    now: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> Manifest:
    """The manifest of ``record``.

    Raises what the reader raised last, if the announced manifest has not come into sight in
    time: ``superseded`` makes all ranks start over with the newer checkpoint.
    """
    give_up = now() + PATIENCE_S
    delay = _FIRST_PAUSE_S
    while True:
        operation.check()
        try:
            manifest, _ = reader.open_checkpoint(checkpoint_id, record)
        except CheckpointError as error:
            if error.kind not in ("superseded", "not_found", "not_committed") or now() > give_up:
                raise
        else:
            return manifest
        pause(delay)
        delay = min(delay * 2, _LONGEST_PAUSE_S)
