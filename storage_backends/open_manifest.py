"""Opening a checkpoint: its manifest, or why there is none.

Belongs here: which manifest counts, and the errors for all that can be wrong with it. Does not
belong here: data files (``verified_files``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from dcp_engine.errors import (
    CheckpointError,
    ConflictError,
    DamagedCheckpointError,
    NotFoundError,
    StorageError,
)
from dcp_engine.format.digest import xxh3_128_hex
from dcp_engine.format.manifest import Manifest, decode_manifest, merge_manifests
from dcp_engine.format.manifest_codec import MAX_MANIFEST_BYTES
from dcp_engine.format.names import MANIFEST_NAME, parse_rank_manifest_name
from dcp_engine.native_storage import CommitRecord
from dcp_engine.storage import ByteStore
from storage_backends.garbage import data_directories
from storage_backends.os_errors import storage_error
from storage_backends.torch_checkpoint import refuse_torch_checkpoint

__all__ = ["decode_manifest_bytes", "read_manifest", "read_manifest_bytes"]

_ATTEMPTS = 3
_JOINTS = re.compile(rb'(?<=\}\n)(?=\{"format":"dcp_engine",)')
"""Between manifests that lie one behind the other. JSON has no place for it inside one: a line
break stands unescaped in no string, and two objects never follow each other without a comma."""


def read_manifest(
    store: ByteStore, *, expected: CommitRecord | None = None
) -> tuple[Manifest, CommitRecord]:
    """The committed checkpoint at ``store``.

    Raises:
        NotFoundError: ``not_found``; ``not_committed`` where data lies but no manifest;
            ``incomplete`` where manifests of some ranks are missing.
        DamagedCheckpointError, UnsupportedVersionError: what lies there cannot be read.
        ConflictError: ``superseded``: it is not ``expected``.
    """
    found = _read_one_manifest(store, expected)
    if found is not None:
        return found
    manifest, record = _read_rank_manifests(store)
    # By its token alone: a rank of such a save knows its own manifest only.
    if expected is not None and manifest.save_id != expected.save_id:
        raise _superseded(store, expected)
    return manifest, record


def _read_one_manifest(
    store: ByteStore, expected: CommitRecord | None
) -> tuple[Manifest, CommitRecord] | None:
    data = _read_stable(store, MANIFEST_NAME)
    if data is None:
        return None
    digest = xxh3_128_hex(data)
    if expected is not None and (len(data), digest) != (
        expected.manifest_size,
        expected.manifest_xxh3,
    ):
        raise _superseded(store, expected)
    try:
        manifest = decode_manifest(data, checkpoint=store.url)
        if manifest.rank is not None:
            raise DamagedCheckpointError("the manifest is that of one rank of several")
    except CheckpointError as error:
        error.with_context(checkpoint=store.url, file=MANIFEST_NAME)
        raise
    return manifest, CommitRecord(
        save_id=manifest.save_id, manifest_size=len(data), manifest_xxh3=digest
    )


def _read_stable(store: ByteStore, name: str) -> bytes | None:
    """The manifest's bytes. Where a store reads size and content by two requests, a save may
    replace the manifest between them: what ends too early or too late is read once more."""
    for _ in range(_ATTEMPTS - 1):
        try:
            data = _read_whole(store, name)
        except DamagedCheckpointError:
            continue
        if data is None or data.endswith(b"}\n"):
            return data
    return _read_whole(store, name)


def _read_rank_manifests(store: ByteStore) -> tuple[Manifest, CommitRecord]:
    """The manifests of a save without collectives, as one."""
    contents = _rank_contents(store)
    merged = _merge(contents, store.url)
    joined = b"".join(contents.values())
    return merged, CommitRecord(
        save_id=merged.save_id, manifest_size=len(joined), manifest_xxh3=xxh3_128_hex(joined)
    )


def _rank_contents(store: ByteStore) -> dict[str, bytes]:
    """The ranks' manifests, by name."""
    try:
        names = sorted(
            file.name
            for file in store.list("manifest-rank")
            if parse_rank_manifest_name(file.name) is not None
        )
        if not names:
            raise _nothing_committed(store)
    except CheckpointError:
        raise
    except OSError as error:
        raise storage_error(
            error, "list the checkpoint", checkpoint=store.url, file=MANIFEST_NAME
        ) from error
    read = ((name, _read_whole(store, name)) for name in names)
    return {name: data for name, data in read if data is not None}


def _merge(contents: Mapping[str, bytes], url: str) -> Manifest:
    manifests = []
    for name, data in contents.items():
        try:
            manifests.append(decode_manifest(data, checkpoint=url))
        except CheckpointError as error:
            error.with_context(file=name)
            raise
    try:
        return merge_manifests(manifests)
    except CheckpointError as error:
        error.with_context(checkpoint=url)
        raise


def read_manifest_bytes(store: ByteStore, record: CommitRecord) -> bytes:
    """What ``read_manifest`` found there: the manifest, or the ranks' manifests joined.

    Raises ``ConflictError(kind="superseded")`` if it is no longer ``record``.
    """
    data = _read_stable(store, MANIFEST_NAME)
    if data is None:
        data = b"".join(_rank_contents(store).values())
    if not _is_described(data, record):
        raise _superseded(store, record)
    return data


def decode_manifest_bytes(data: bytes, record: CommitRecord, *, url: str) -> Manifest:
    """The manifest that ``read_manifest_bytes`` read somewhere else.

    Raises ``DamagedCheckpointError(kind="digest_mismatch")`` if it is not ``record``.
    """
    if not _is_described(data, record):
        raise DamagedCheckpointError(
            f"{len(data)} bytes were handed over, and they are not the manifest of "
            f"{record.save_id}",
            kind="digest_mismatch",
            checkpoint=url,
            file=MANIFEST_NAME,
            hint="load again",
        )
    parts = _JOINTS.split(data)
    if len(parts) == 1:
        manifest = decode_manifest(data, checkpoint=url)
        if manifest.rank is None:
            return manifest
    return _merge({f"manifest {at} of {len(parts)}": p for at, p in enumerate(parts)}, url)


def _is_described(data: bytes, record: CommitRecord) -> bool:
    return (len(data), xxh3_128_hex(data)) == (record.manifest_size, record.manifest_xxh3)


def _nothing_committed(store: ByteStore) -> NotFoundError:
    directories = data_directories(store.list("data-"))
    if not directories:
        refuse_torch_checkpoint(store)
        return NotFoundError(
            "there is no checkpoint here",
            checkpoint=store.url,
            hint="check the path; a checkpoint is a directory with a manifest.json",
        )
    return NotFoundError(
        f"there is data of {len(directories)} unfinished saves, but no checkpoint was committed",
        kind="not_committed",
        checkpoint=store.url,
        hint="the save is still running, or it failed; load an earlier checkpoint",
    )


def _read_whole(store: ByteStore, name: str) -> bytes | None:
    try:
        return store.get(name, limit=MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        return None
    except EOFError as error:
        raise DamagedCheckpointError(
            f"the manifest ends early: {error}",
            kind="manifest_truncated",
            checkpoint=store.url,
            file=name,
        ) from error
    except CheckpointError:
        raise
    except ValueError as error:
        raise DamagedCheckpointError(str(error), checkpoint=store.url, file=name) from error
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise storage_error(error, "read the manifest", checkpoint=store.url, file=name) from error


def _superseded(store: ByteStore, expected: CommitRecord) -> ConflictError:
    return ConflictError(
        f"checkpoint {expected.save_id} was replaced by another save",
        kind="superseded",
        checkpoint=store.url,
        hint="load again",
    )
