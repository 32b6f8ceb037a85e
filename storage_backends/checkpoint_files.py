"""The files of one open checkpoint, each checked before anything in it counts.

Belongs here: digest tables, headers and sizes, read once per open and kept; and what a missing
or short file means. Does not belong here: which bytes a load needs (``read_plan``), and reading
them (``read_files``).
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from dcp_engine.errors import (
    CheckpointError,
    ConflictError,
    DamagedCheckpointError,
    NotFoundError,
    StorageError,
)
from dcp_engine.format.digest import DigestTable, decode_digests, digest_value, xxh3_128_hex
from dcp_engine.format.manifest import DataFile, Manifest
from dcp_engine.format.names import MANIFEST_NAME
from dcp_engine.format.shard_file import EntryColumns, Stored, parse_data_start, parse_header
from dcp_engine.storage import ByteStore, Check, ReadRange
from storage_backends.jobs import run_jobs
from storage_backends.os_errors import storage_error
from storage_backends.present import present_checkpoint

__all__ = ["CheckpointFiles"]

I64 = npt.NDArray[np.int64]

HEADER_BYTES = 1 << 20
"""What is read of a header before it is known to be longer: most headers are not."""
FETCH_BYTES = 64 << 20
"""What is fetched of a digest file before it is known to be that long: the digests of 0.5 TB."""


class CheckpointFiles:
    """Opened by manifest. Thread-safe.

    Args:
        store, manifest: of the checkpoint.
        verify_digests: False: no digest of tensor data is read or compared.
        adopted: the manifest came from another rank, because the medium did not show it here.
    """

    def __init__(
        self, store: ByteStore, manifest: Manifest, *, verify_digests: bool, adopted: bool = False
    ) -> None:
        self.store = store
        self.manifest = manifest
        self.verify_digests = verify_digests
        self._adopted = adopted
        self._lock = threading.RLock()
        self._data_is_here = False
        self._tables: dict[int, DigestTable] = {}
        self._headers: dict[int, EntryColumns] = {}
        self._sizes: dict[str, int] = {}
        self._begins: dict[str, bytes] = {}
        """By file, what was fetched ahead and not looked at yet."""

    def path(self, name: str) -> str:
        """Name in the store of file ``name`` of the data directory."""
        return f"{self.manifest.data_directory}/{name}"

    @contextmanager
    def reading(self, name: str, *, tensor: str | None = None) -> Iterator[None]:
        """What a failed read of file ``name`` means.

        A file that is gone is damage, unless another checkpoint has taken this one's place since
        it was opened (``superseded``).
        """
        url, path = self.store.url, self.path(name)
        try:
            yield
        except FileNotFoundError as error:
            self._refuse_superseded(error)
            raise DamagedCheckpointError(
                "a file that the manifest names is not there",
                kind="file_missing",
                checkpoint=url,
                file=path,
                tensor=tensor,
                hint="take another checkpoint",
            ) from error
        except EOFError as error:
            raise DamagedCheckpointError(
                f"a file is shorter than the manifest says: {error}",
                kind="file_short",
                checkpoint=url,
                file=path,
                tensor=tensor,
                hint="take another checkpoint",
            ) from error
        except CheckpointError as error:
            # NFS says ESTALE where others say that the file is gone.
            if isinstance(error, StorageError) and error.errno == errno.ESTALE:
                self._refuse_superseded(error)
            error.with_context(checkpoint=url, file=path, tensor=tensor)
            raise
        except OSError as error:
            raise storage_error(error, "read the file", checkpoint=url, file=path).with_context(
                tensor=tensor
            ) from error

    def _refuse_superseded(self, error: OSError) -> None:
        """Raise if what was read is not there because there is another checkpoint now, or because
        this rank does not see what the one that read the manifest sees."""
        present = present_checkpoint(self.store)
        if present == self.manifest.save_id:
            return
        if present is None and self._adopted:
            raise NotFoundError(
                "neither the manifest nor the data is here, though another rank reads them",
                checkpoint=self.store.url,
                file=MANIFEST_NAME,
                hint="check that all hosts mount the same storage at this path",
            ) from error
        raise ConflictError(
            f"checkpoint {self.manifest.save_id} was replaced while it was read "
            f"({'there is none now' if present is None else f'there is {present} now'})",
            kind="superseded",
            checkpoint=self.store.url,
            hint="load again, when nobody saves to this place",
        ) from error

    def require_data(self) -> None:
        """Refuse a manifest that lies here without the data it was written for, as one copied from
        another checkpoint does. For reads that the manifest alone can answer: all others find
        out by themselves. Looks once, and not where a file has been read."""
        with self._lock:
            if self._data_is_here or self._tables or self._headers:
                return
        for entry in self.manifest.digest_files[:1]:
            with self.reading(entry.name):
                self.compare_size(entry.name, entry.size)
        with self._lock:
            self._data_is_here = True

    def prefetch(self, rows: Iterable[int], *, threads: int, check: Check) -> None:
        """Read sizes, headers and digests of data files ``rows`` side by side, if the store is one
        whose requests are slow to begin: one after the other they would take longer than the
        data."""
        if self.store.preferred_read <= ByteStore.preferred_read:
            return
        files = [self.manifest.data_files[row] for row in sorted({*rows} - self._headers.keys())]
        begins: dict[str, int] = {}
        # The tables first: of several errors the first one's counts.
        if self.verify_digests:
            ranks = {file.rank for file in files} - self._tables.keys()
            tables = [self.manifest.digest_file(rank) for rank in sorted(ranks)]
            begins = {entry.name: min(entry.size, FETCH_BYTES) for entry in tables}
        begins |= {file.name: _first_part(file) for file in files}
        jobs = [partial(self._fetch_size, name) for name in begins]
        jobs += [partial(self._fetch, name, 0, end) for name, end in begins.items()]
        run_jobs(jobs, lambda job, _: job(), threads=threads, check=check)
        # What is longer than that is so by the sizes, which are known now.
        rests = [
            partial(self._fetch, file.name, begins[file.name], file.data_start)
            for file in files
            if begins[file.name] < file.data_start <= file.size == self._sizes[file.name]
        ]
        run_jobs(rests, lambda job, _: job(), threads=threads, check=check)

    def _fetch_size(self, name: str) -> None:
        with self.reading(name):
            size = self.store.size(self.path(name))
        with self._lock:
            self._sizes[name] = size

    def _fetch(self, name: str, begin: int, end: int) -> None:
        with self.reading(name):
            data = self._bytes(name, begin, end)
        with self._lock:
            self._begins[name] = self._begins.get(name, b"") + data

    def _bytes(self, name: str, begin: int, end: int) -> bytes:
        """Bytes ``begin`` to ``end`` of file ``name``, as far as they were not fetched ahead."""
        with self._lock:
            ahead = self._begins.get(name, b"")[begin:end]
        memory = bytearray(end - begin - len(ahead))
        if memory:
            where = self.path(name)
            self.store.read(where, [ReadRange(begin + len(ahead), memoryview(memory))])
        return ahead + memory

    def table(self, rank: int) -> DigestTable:
        """The digests of ``rank``'s files, themselves checked against the manifest."""
        with self._lock:
            table = self._tables.get(rank)
            if table is None:
                table = self._tables[rank] = self._read_table(rank)
            return table

    def block_digests(self, row: int, start: int) -> bytes:
        """The digests of the chunk at ``start`` of data file ``row``, one behind the other."""
        file = self.manifest.data_files[row]
        _, digests = self.table(file.rank).lookup(file.number, start)
        return digests.tobytes()

    def _read_table(self, rank: int) -> DigestTable:
        entry = self.manifest.digest_file(rank)
        with self.reading(entry.name):
            table = decode_digests(
                self._read_checked(entry.name, entry.size, entry.xxh3_128, "digest file")
            )
            if table.block_size != self.manifest.block_size:
                raise DamagedCheckpointError(
                    f"blocks of {table.block_size} bytes, and the manifest says "
                    f"{self.manifest.block_size}",
                    kind="digest_mismatch",
                )
            return table

    def _read_checked(self, name: str, size: int, xxh3_128: str, what: str) -> bytes:
        self.compare_size(name, size)
        data = self._bytes(name, 0, size)
        with self._lock:
            self._begins.pop(name, None)
        if xxh3_128_hex(data) != xxh3_128:
            raise DamagedCheckpointError(
                f"the {what} is not what was written", kind="digest_mismatch"
            )
        return data

    def compare_size(self, name: str, size: int) -> None:
        """Raise ``file_short`` unless file ``name`` has ``size`` bytes."""
        with self._lock:
            found = self._sizes.pop(name, None)
        if found is None:
            found = self.store.size(self.path(name))
        if found != size:
            raise DamagedCheckpointError(
                f"the file has {found} bytes, and the manifest says {size}",
                kind="file_short",
                hint="take another checkpoint",
            )

    def local_path(self, row: int) -> str | None:
        """The local path of data file ``row``, whose size is right; None if it has none."""
        file = self.manifest.data_files[row]
        with self.reading(file.name):
            self.compare_size(file.name, file.size)
        return self.store.local_path(self.path(file.name))

    def header(self, row: int) -> EntryColumns:
        """The header of data file ``row``, checked: the file's size, the header's own digest, and
        that it is a valid one."""
        with self._lock:
            header = self._headers.get(row)
            if header is None:
                header = self._headers[row] = self._read_header(row)
            return header

    def _read_header(self, row: int) -> EntryColumns:
        file = self.manifest.data_files[row]
        # The table first: it has an error of its own, and names a file of its own.
        table = self.table(file.rank) if self.verify_digests else None
        with self.reading(file.name):
            data = self._header_bytes(file)
            parsed = parse_header(data, file.size)
            if table is not None and digest_value(data) != table.header_digest(file.number):
                raise DamagedCheckpointError(
                    "the header is not what was written", kind="header_mismatch"
                )
        return _some_bytes(parsed.columns)

    def _header_bytes(self, file: DataFile) -> bytes:
        """The header's bytes, of a file that is as long as it should be."""
        self.compare_size(file.name, file.size)
        first = self._bytes(file.name, 0, _first_part(file))
        if parse_data_start(first[:8], file.size) != file.data_start:
            raise DamagedCheckpointError(
                "the header is not as long as the manifest says", kind="header_mismatch"
            )
        data = first + self._bytes(file.name, len(first), file.data_start)
        with self._lock:
            self._begins.pop(file.name, None)
        return data

    def compare_entries(
        self,
        row: int,
        starts: I64,
        nbytes: I64,
        stored: Sequence[Stored],
        kinds: I64,
        tensors: Sequence[str],
    ) -> None:
        """Raise ``header_mismatch`` unless data file ``row`` lists n chunks just so.

        Args:
            starts, nbytes: (n,) first bytes, behind the begin of the data section, and sizes.
            stored: dtypes and shapes as ``format.dtypes.stored_shape`` gives them.
            kinds: (n,) rows of ``stored``.
            tensors: (n,) for the message.
        """
        header = self.header(row)
        at = np.searchsorted(header.begins, starts)
        inside = np.minimum(at, max(len(header.begins) - 1, 0))
        listed = np.array([header.stored.get(entry, -1) for entry in stored], np.int64)
        if len(header.begins):
            same = (
                (header.begins[inside] == starts)
                & (header.ends[inside] == starts + nbytes)
                & (header.kinds[inside] == listed[kinds])
            )
        else:
            same = np.zeros(len(starts), np.bool_)
        if same.all():
            return
        first = int(np.argmin(same))
        found = None
        if len(header.begins) and header.begins[inside[first]] == starts[first]:
            kind = int(header.kinds[inside[first]])
            found = next(entry for entry, number in header.stored.items() if number == kind)
        self._refuse_entry(
            row, int(starts[first]), stored[int(kinds[first])], found, tensors[first]
        )

    def _refuse_entry(
        self, row: int, start: int, stored: Stored, found: Stored | None, tensor: str
    ) -> NoReturn:
        file = self.manifest.data_files[row]
        listed = "nothing" if found is None else f"{found[0]} of shape {list(found[1])}"
        raise DamagedCheckpointError(
            f"the manifest has {stored[0]} of shape {list(stored[1])} at byte {start}, and the "
            f"file's header {listed}",
            kind="header_mismatch",
            checkpoint=self.store.url,
            file=self.path(file.name),
            tensor=tensor,
            hint="take another checkpoint",
        )

    def damaged(self, file: DataFile, begin: int, end: int, tensor: str) -> DamagedCheckpointError:
        """The error for bytes ``begin`` to ``end`` of ``file``, whose digest is another one."""
        return DamagedCheckpointError(
            f"bytes {begin} to {end - 1} of the file differ from what was written",
            kind="digest_mismatch",
            checkpoint=self.store.url,
            file=self.path(file.name),
            tensor=tensor,
            hint="take another checkpoint",
        )

    def extra(self, name: str) -> bytes | None:
        """The content of extra file ``name`` (``extra/...``), checked; None if there is none."""
        for entry in self.manifest.extra_files:
            if entry.name == name:
                with self.reading(entry.name):
                    return self._read_checked(entry.name, entry.size, entry.xxh3_128, "extra file")
        return None


def _first_part(file: DataFile) -> int:
    """Bytes of the header that are read before it is known to be longer."""
    return min(file.data_start, file.size, HEADER_BYTES)


def _some_bytes(columns: EntryColumns) -> EntryColumns:
    """Without entries that hold none: they begin where the next one does, and are nobody's
    chunk."""
    some = columns.ends > columns.begins
    return EntryColumns(
        begins=columns.begins[some],
        ends=columns.ends[some],
        kinds=columns.kinds[some],
        stored=columns.stored,
    )
