"""The moment at which a checkpoint comes to be: a manifest takes its name.

Belongs here: the protocol of one manifest, and the proof of its outcome. Does not belong here:
what the manifest says (``reports``), and who decides that there is a commit (``saver``).

An error other than ``kind="commit_in_doubt"`` means: the manifest was provably not replaced.
"""

from __future__ import annotations

from typing import NoReturn

from dcp_engine.errors import CheckpointError, ConflictError, StorageError
from dcp_engine.format.names import MANIFEST_NAME
from dcp_engine.storage import ByteStore
from storage_backends.present import present_checkpoint, present_save_id
from storage_backends.store_errors import writing

__all__ = ["commit_manifest", "temporary_name"]

_REFUSALS = frozenset({"disk_full", "permission_denied", "unsupported_storage"})
"""Kinds by which a store says that it did not take an object; after any other error of a ``put``
the object may still arrive."""


def temporary_name(directory: str, name: str) -> str:
    """Where a manifest lies before it takes its name: inside the data directory, so that nothing
    but data directories ever lies beside manifests."""
    return f"{directory}/{name}.tmp"


def commit_manifest(
    store: ByteStore,
    data: bytes,
    *,
    directory: str,
    name: str,
    save_id: str,
    observed: str | None,
) -> None:
    """Make ``data`` the manifest ``name``, durably.

    Args:
        directory: the save's data directory.
        save_id: the one in ``data``.
        observed: the save id of the checkpoint that was there when this save began, or None.

    Raises ``ConflictError``: ``conflict`` if another checkpoint is there than ``observed``,
    ``commit_in_doubt`` if it cannot be known whether ``data`` took its name durably.
    """
    if store.atomic_replace:
        _replace(store, data, directory, name, save_id, observed)
    else:
        _put(store, data, name, save_id, observed)
    try:
        store.sync_directory("")
    except Exception as error:
        _doubt(store, "the manifest has its name, but may not be on stable storage", error)


def _replace(
    store: ByteStore, data: bytes, directory: str, name: str, save_id: str, observed: str | None
) -> None:
    temporary = temporary_name(directory, name)
    with writing(store, "write the manifest", file=temporary):
        file = store.create(temporary, len(data))
        try:
            file.write([memoryview(data)], 0)
            file.sync()
            file.close()
        except BaseException:
            file.abort()
            raise
    _refuse_if_changed(store, name, observed)
    try:
        store.replace(temporary, name)
    except Exception as error:
        if _settle(store, name, save_id, observed, error):
            return
        with writing(store, "rename the manifest", file=name):
            raise


def _put(store: ByteStore, data: bytes, name: str, save_id: str, observed: str | None) -> None:
    # Before the look: what comes between it and the look is seen there, what comes later here.
    tag = None if observed is None else _tag(store, name)
    _refuse_if_changed(store, name, observed)
    try:
        if tag is not None:
            store.put_over(name, data, tag)
        else:
            store.put(name, data, if_absent=observed is None and store.create_if_absent)
    except FileExistsError as error:
        # Our own first attempt may have come through, its reply lost, and the second lost to it.
        if _settle(store, name, save_id, observed, error):
            return
        _doubt(store, "the store said that there is another manifest, and then that not", error)
    except Exception as error:
        if _settle(store, name, save_id, observed, error):
            return
        if isinstance(error, StorageError) and error.kind in _REFUSALS:
            raise
        _doubt(store, "writing the manifest failed, and it may still arrive", error)


def _tag(store: ByteStore, name: str) -> str | None:
    """What the store knows the present manifest by; None if it knows no such thing, or if ranks'
    manifests are what was observed."""
    if not store.replace_if_same:
        return None
    with writing(store, "look at the present manifest", file=name):
        try:
            return store.tag(name)
        except FileNotFoundError:
            return None


def _refuse_if_changed(store: ByteStore, name: str, observed: str | None) -> None:
    with writing(store, "look at the present manifest", file=name):
        present = _present(store, name)
    if present != observed:
        _conflict(store, observed, present)


def _present(store: ByteStore, name: str) -> str | None:
    return present_checkpoint(store) if name == MANIFEST_NAME else present_save_id(store, name)


def _settle(
    store: ByteStore, name: str, save_id: str, observed: str | None, error: Exception
) -> bool:
    """After a failure: True if the manifest is ours, False if it is the one observed before."""
    try:
        present = present_save_id(store, name)
        before = observed if present is not None else None
    except Exception as second:
        second.__cause__ = error
        _doubt(store, "committing failed, and the manifest cannot be read", second)
    if present == save_id:
        return True
    if present == before:
        return False
    if isinstance(error, FileExistsError):
        _conflict(store, observed, present)
    _doubt(store, "committing failed, and another save has committed meanwhile", error)


def _conflict(store: ByteStore, observed: str | None, present: str | None) -> NoReturn:
    raise ConflictError(
        f"another save was committed meanwhile: the checkpoint is {present or 'gone'}, and was "
        f"{observed or 'not there'} when this save began",
        checkpoint=store.url,
        hint="two jobs save to one place; give each its own checkpoint_id",
    )


def _doubt(store: ByteStore, message: str, error: Exception) -> NoReturn:
    reason = error.message if isinstance(error, CheckpointError) else f"{error}"
    raise ConflictError(
        f"{message} ({type(error).__name__}: {reason})",
        kind="commit_in_doubt",
        checkpoint=store.url,
        hint="nothing was deleted; the next save, load or prune decides by the manifest",
    ) from error
