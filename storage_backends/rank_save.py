"""One save on one rank: its files, from the data directory to the commit or the clean-up.

Belongs here: the steps, and the record of what this rank wrote, so that it can be removed. Does
not belong here: the interfaces that savers see (``sharded_writer``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import accumulate

import numpy as np
import torch

from dcp_engine.errors import CheckpointError, ConflictError, UsageError
from dcp_engine.format.digest import encode_digests, xxh3_128_hex
from dcp_engine.format.manifest import ExtraFile, encode_user_metadata
from dcp_engine.format.names import (
    MANIFEST_NAME,
    OWNER_NAME,
    data_directory,
    data_file_name,
    digest_file_name,
    extra_file_name,
    is_save_id,
    rank_manifest_name,
)
from dcp_engine.format.shard_file import encode_header_columns, entry_names
from dcp_engine.native_storage import CommitRecord, FileReport, RankReport, SaveTicket
from dcp_engine.planning.columns import GlobalPlan
from dcp_engine.storage import ByteStore, Check
from storage_backends.commit import commit_manifest, temporary_name
from storage_backends.garbage import owner_record, read_owner
from storage_backends.layout import FileLayout, RankLayout
from storage_backends.lowered_thread import run_lowered
from storage_backends.open_files import OpenFiles
from storage_backends.present import complete_set, present_checkpoint, rank_manifests
from storage_backends.present import present_save_id as manifest_save_id
from storage_backends.replaced_data import remove_replaced_data
from storage_backends.reports import check_reports, make_manifest
from storage_backends.store_errors import require_shared, writing
from storage_backends.tensor_bytes import require_little_endian
from storage_backends.torch_checkpoint import warn_of_torch_checkpoint
from storage_backends.write_files import WriteOptions, WrittenFile, write_file

__all__ = ["RankSave"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Replaced:
    """What the commit took the place of."""

    observed: str | None


class RankSave:
    """Order of calls: ``begin``, ``write``, ``commit`` (who commits), ``remove_replaced`` (the
    coordinator); ``abort`` at any time before the commit.

    Args:
        store: of the checkpoint.
        ticket: which save, which rank.
        options: how to write.
        overwrite: False refuses a place where a checkpoint is.
    """

    def __init__(
        self, store: ByteStore, ticket: SaveTicket, options: WriteOptions, *, overwrite: bool
    ) -> None:
        self.store = store
        self.ticket = ticket
        self._options = options
        self._overwrite = overwrite
        self._directory = data_directory(ticket.save_id)
        self._begun = False
        self._written: list[str] = []
        self._extra: list[ExtraFile] = []
        self._observed: str | None = None
        self._replaced: _Replaced | None = None
        self._wrote: list[int] = []

    @property
    def bytes_written(self) -> int:
        """Bytes of data files that were handed to the medium so far; asked by any thread."""
        return sum(self._wrote)

    @property
    def _is_coordinator(self) -> bool:
        return self.ticket.rank == self.ticket.coordinator_rank

    @property
    def _manifest_name(self) -> str:
        if self.ticket.use_collectives:
            return MANIFEST_NAME
        return rank_manifest_name(self.ticket.rank)

    def begin(self) -> None:
        """Create the data directory; on the coordinator also ``owner.json``."""
        require_little_endian()
        store, ticket = self.store, self.ticket
        if ticket.world_size > 1:
            require_shared(store, f"{ticket.world_size} ranks save together")
        if ticket.by_worker:
            require_shared(store, "a worker process was to write there; save by a thread")
        self._extra_names()
        encode_user_metadata(ticket.user_metadata)
        with writing(store, "look for a checkpoint", file=self._manifest_name):
            self._refuse_present()
        if self._is_coordinator:
            warn_of_torch_checkpoint(store)
        self._begun = True
        # All directories now: one that is missing later was removed, and must stay so.
        for directory in (self._directory, *_parents(self._directory, self._own_extra())):
            with writing(store, "create the data directory", file=directory):
                store.make_directory(directory)
        if self._is_coordinator:
            name = f"{self._directory}/{OWNER_NAME}"
            with self._writing(name, "write the owner record"):
                store.put(name, owner_record(ticket.identity))

    def _refuse_present(self) -> None:
        if self.ticket.use_collectives:
            if not self._overwrite and self._is_coordinator:
                present = present_checkpoint(self.store)
                if present is not None:
                    self._refuse(f"checkpoint {present} is there, and overwrite is False")
            return
        present = manifest_save_id(self.store)
        if present is None:
            present = complete_set(rank_manifests(self.store))
        if present is not None:
            raise ConflictError(
                f"checkpoint {present} is there, and a save without collectives cannot replace "
                "one atomically",
                checkpoint=self.store.url,
                hint="choose another checkpoint_id, or remove the old checkpoint first",
            )

    def _refuse(self, message: str) -> None:
        raise UsageError(
            message,
            checkpoint=self.store.url,
            hint="choose another checkpoint_id, or allow to overwrite",
        )

    def _extra_names(self) -> dict[str, str]:
        """Stored names of the caller's extra files, by the caller's."""
        try:
            stored = {name: extra_file_name(name) for name in self.ticket.extra_files}
        except ValueError as error:
            raise UsageError(
                str(error),
                checkpoint=self.store.url,
                hint="give it a relative name, as in 'config.json' or 'tokenizer/vocab.txt'",
            ) from error
        directories = set(_parents("", stored.values()))
        for name, path in stored.items():
            if f"/{path}" in directories:
                raise UsageError(
                    f"extra file {name!r} has the name of a directory of other extra files",
                    checkpoint=self.store.url,
                    hint="rename one of them",
                )
        return stored

    def _own_extra(self) -> dict[str, bytes]:
        """The extra files that this rank writes, by stored name: all on the coordinator."""
        if not self._is_coordinator:
            return {}
        return {s: self.ticket.extra_files[n] for n, s in self._extra_names().items()}

    def write(self, layout: RankLayout, check: Check) -> RankReport:
        """Write all files of ``layout``, and their digests, and sync them; on the coordinator the
        caller's extra files too; then the directory."""
        with OpenFiles(self.store) as files:
            written = self._write_all_data(layout, check, files)
            digests = self._write_digests(layout, written, check, files)
            check()
            files.finish()
        self._write_extra_files(self._own_extra(), check)
        check()
        with writing(self.store, "make the data directory durable", file=self._directory):
            self.store.sync_directory(self._directory)
        return RankReport(
            rank=self.ticket.rank,
            files=[FileReport(f.number, f.data_start, f.size) for f in written],
            chunks=layout.chunks,
            digests_size=len(digests),
            digests_xxh3=xxh3_128_hex(digests) if digests else "",
            objects=list(layout.objects),
        )

    def _write_all_data(
        self, layout: RankLayout, check: Check, files: OpenFiles
    ) -> list[WrittenFile]:
        def write() -> list[WrittenFile]:
            return [self._write_data(file, check, files) for file in layout.files]

        # What other media start from here, event loops for instance, outlives the save.
        if self.ticket.nice and self.store.local_path(self._directory) is not None:
            return run_lowered(write, self.ticket.nice)
        return write()

    def _write_data(self, file: FileLayout, check: Check, files: OpenFiles) -> WrittenFile:
        name = f"{self._directory}/{data_file_name(self.ticket.rank, file.number)}"
        with self._writing(name, "write the data file"):
            header = _header(file, self.ticket.save_id)
            return write_file(
                self.store, name, file, header, self._options, check, self._wrote.append, files
            )

    def _write_digests(
        self, layout: RankLayout, written: Sequence[WrittenFile], check: Check, files: OpenFiles
    ) -> bytes:
        if not written:
            return b""
        sizes = [np.array(file.sizes, np.int64) for file in layout.files]
        data = encode_digests(
            block_size=self._options.block_size,
            header_digests=[(file.number, file.header_digest) for file in written],
            file=np.repeat([file.number for file in layout.files], [len(s) for s in sizes]),
            start=np.concatenate([np.cumsum(s) - s for s in sizes]),
            nbytes=np.concatenate(sizes),
            blocks=np.concatenate([file.blocks for file in written]),
        )
        name = f"{self._directory}/{digest_file_name(self.ticket.rank)}"
        self._write_small(name, data, check, files)
        return data

    @contextmanager
    def _writing(self, name: str, action: str) -> Iterator[None]:
        """File ``name`` goes if the save fails; not so if it was somebody else's before."""
        with writing(self.store, action, file=name):
            self._written.append(name)
            try:
                yield
            except FileExistsError:
                self._written.remove(name)
                raise

    def _write_small(self, name: str, data: bytes, check: Check, files: OpenFiles) -> None:
        check()
        with self._writing(name, "write the file"):
            file = files.create(name, len(data))
            try:
                if data:
                    file.write([memoryview(data)], 0)
            except BaseException:
                file.abort()
                raise
            files.add(name, file, len(data))

    def _write_extra_files(self, files: Mapping[str, bytes], check: Check) -> None:
        with OpenFiles(self.store) as unfinished:
            for stored, content in files.items():
                self._write_small(f"{self._directory}/{stored}", content, check, unfinished)
                unfinished.finish()
                self._extra.append(
                    ExtraFile(name=stored, size=len(content), xxh3_128=xxh3_128_hex(content))
                )
        for directory in reversed(_parents(self._directory, files)):
            with writing(self.store, "make the directory durable", file=directory):
                self.store.sync_directory(directory)

    def add_extra_file(self, stored: str, content: bytes) -> None:
        """Write one more extra file (``extra/...``), after ``write`` and before ``commit``."""
        for directory in _parents(self._directory, [stored]):
            with writing(self.store, "create the directory", file=directory):
                if self._written:
                    self.store.size(self._written[0])  # not there if the data was removed
                self.store.make_directory(directory)
        self._write_extra_files({stored: content}, lambda: None)

    def commit(
        self, plan: GlobalPlan, reports: Sequence[RankReport], observed: str | None
    ) -> CommitRecord:
        """Check ``reports``, write the manifest, make it the checkpoint."""
        ticket = self.ticket
        ranks = range(ticket.world_size) if ticket.use_collectives else [ticket.rank]
        try:
            checked = check_reports(plan, reports, list(ranks))
        except CheckpointError as error:
            error.with_context(checkpoint=self.store.url)
            raise
        data = make_manifest(
            plan,
            checked,
            ticket,
            time=time.time(),
            writers=_versions(),
            block_size=self._options.block_size,
            extra_files=self._extra,
        )
        name = self._manifest_name
        if not ticket.use_collectives:
            self._refuse_present()
            observed = manifest_save_id(self.store, name)
        if self.store.atomic_replace:
            self._written.append(temporary_name(self._directory, name))
        self._observed = observed
        commit_manifest(
            self.store,
            data,
            directory=self._directory,
            name=name,
            save_id=ticket.save_id,
            observed=observed,
        )
        self._replaced = _Replaced(observed=observed)
        return CommitRecord(
            save_id=ticket.save_id, manifest_size=len(data), manifest_xxh3=xxh3_128_hex(data)
        )

    def remove_replaced(self) -> None:
        """Remove the data of the checkpoint that the commit replaced, and orphans whose owner is
        provably dead. Failing to is logged, not raised: the save has succeeded."""
        if self._replaced is None or not self.ticket.use_collectives:
            return
        try:
            remove_replaced_data(self.store, self.ticket, self._replaced.observed)
        except Exception:  # whatever a store raises: the new checkpoint is committed
            logger.warning("could not remove old data from %s", self.store.url, exc_info=True)

    def abort(self) -> None:
        """Remove what this rank wrote; the last rank to do so removes the data directory."""
        if not self._begun:
            return
        store = self.store
        owner = f"{self._directory}/{OWNER_NAME}"
        store.delete(reversed([name for name in self._written if name != owner]))
        # Somebody else's files keep the directory, and the owner record that explains it.
        empty = self._remove_if_empty(owner)
        if not empty and self.ticket.use_collectives and owner in self._written:
            with suppress(FileNotFoundError):  # the last rank has removed the directory
                store.put(owner, owner_record(self.ticket.identity, given_up=True))
            # A rank that finished meanwhile may have seen the record being written, and left.
            self._remove_if_empty(owner)
        self._written.clear()

    def _remove_if_empty(self, owner: str) -> bool:
        rest = [file.name for file in self.store.list(f"{self._directory}/")]
        empty = [name for name in rest if name.endswith("/")]
        if set(rest) - {owner, *empty}:
            return False
        self.store.delete([*empty, owner, self._directory])
        return True

    def leave_in_doubt(self) -> None:
        """Delete nothing. On the coordinator, whose attempt to commit is over whatever became of
        it (a rename is; a PUT may still arrive), mark the data as given up, and so that of the
        checkpoint it was to replace: the manifest tells the next save which of them counts."""
        owner = f"{self._directory}/{OWNER_NAME}"
        # Without a rename the manifest may be on its way still, and must find its data then.
        if not (self.store.atomic_replace and self._is_coordinator and owner in self._written):
            return
        mark = owner_record(self.ticket.identity, given_up=True)
        self.store.put(owner, mark)
        if self._observed is not None and is_save_id(self._observed):
            replaced = data_directory(self._observed)
            if read_owner(self.store, replaced) is not None:
                self.store.put(f"{replaced}/{OWNER_NAME}", mark)


def _parents(directory: str, files: Iterable[str]) -> list[str]:
    """The directories below ``directory`` that ``files`` lie in, parents first."""
    found: set[str] = set()
    for name in files:
        parts = name.split("/")[:-1]
        found.update("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return [f"{directory}/{name}" for name in sorted(found)]


def _header(layout: FileLayout, save_id: str) -> bytes:
    ends = list(accumulate(layout.sizes))
    return encode_header_columns(
        entry_names(layout.names, layout.offsets),
        layout.codes,
        layout.shapes,
        [0, *ends[:-1]] if ends else [],
        ends,
        {"format": "pt", "dcp_engine.save_id": save_id},
    )


def _versions() -> Mapping[str, str]:
    try:
        own = metadata.version("dcp_engine")
    except metadata.PackageNotFoundError:
        own = "unknown"  # run from a source tree that is not installed
    return {"dcp_engine": own, "torch": str(torch.__version__)}
