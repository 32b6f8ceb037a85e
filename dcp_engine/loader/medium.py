"""Whether ranks should hand on what they read: the rule behind ``shared_reads="auto"``.

Belongs here: what a rank can tell of where the checkpoint lies, and the decision over what all
ranks told. Does not belong here: who reads what (``planning.shared_reads``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from dcp_engine.format.manifest import Manifest
from dcp_engine.native_storage import ColumnarReader

__all__ = ["MAX_RANKS", "RankPlace", "file_system_type", "place_of", "worth_handing_on"]

MAX_RANKS = 256
"""Above, "auto" means "direct": every rank is connected with every other one, which costs the
store a look-up for each pair (65,000 for 256 ranks, some seconds)."""

NETWORK_FILE_SYSTEMS = frozenset(
    {
        "nfs",
        "nfs4",
        "lustre",
        "gpfs",
        "beegfs",
        "ceph",
        "cifs",
        "smb3",
        "smbfs",
        "9p",
        "virtiofs",
        "afs",
        "glusterfs",
        "orangefs",
        "pvfs2",
        "panfs",
        "wekafs",
        "daos",
        "vastnfs",
        "gfs2",
        "ocfs2",
    }
)
"""As ``/proc/self/mountinfo`` names them; and all that begins with ``fuse``."""


class RankPlace(msgspec.Struct, frozen=True, array_like=True):
    """Where one rank runs and reads from."""

    host: str
    """What the ranks of one page cache have in common; empty: not known."""
    is_local: bool
    """The checkpoint lies on a file system of the rank's own host."""


def worth_handing_on(places: Sequence[RankPlace]) -> bool:
    """Whether to read once what several ranks need, or let each rank read it for itself.

    Ranks of one host share its page cache: the second one that reads a block gets it from memory,
    digest checked, at 2 GB/s and more for each rank, while a block that is handed on over
    loopback goes through a socket. Measured with ``python -m benchmarks shared_reads`` (2 cores,
    128 MiB replicated, warm): direct is 3.1 times as fast on 2 ranks and 3.7 times on 4. A medium
    that lies behind a network, or that several hosts read, delivers every copy anew: at 200 MB/s
    for all ranks together (throttled in the same benchmark), reading once is 1.7 and 2.4 times as
    fast.
    """
    if not 1 < len(places) <= MAX_RANKS:
        return False
    if not all(place.is_local for place in places):
        return True
    return len({place.host for place in places}) > 1


def place_of(reader: ColumnarReader, manifest: Manifest, host: str) -> RankPlace:
    """This rank's. ``host`` is a name that no other host has (the boot id)."""
    if not manifest.data_files:
        return RankPlace(host=host, is_local=True)
    path = reader.local_data_file(manifest, 0)
    if path is None:
        return RankPlace(host=host, is_local=False)
    kind = file_system_type(path)
    network = kind in NETWORK_FILE_SYSTEMS or kind.startswith("fuse")
    return RankPlace(host=host, is_local=not network)


def file_system_type(path: str, mounts: str | None = None) -> str:
    """The type of the file system that holds ``path``; empty where the system does not say.

    Args:
        mounts: content of ``/proc/self/mountinfo``; by default this process's.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(errors="replace")
        except OSError:  # not Linux
            return ""
        path = str(Path(path).resolve())
    found, best = "", -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        columns, types = before.split(), after.split()
        if len(columns) < 5 or not types:
            continue
        point = _unescaped(columns[4]).rstrip("/")
        # The last of several mounts at one point hides the others.
        if (path == point or path.startswith(point + "/")) and len(point) >= best:
            found, best = types[0], len(point)
    return found


def _unescaped(text: str) -> str:
    """Blanks and backslashes stand there as octal numbers."""
    for code, character in (("040", " "), ("011", "\t"), ("012", "\n"), ("134", "\\")):
        text = text.replace(f"\\{code}", character)
    return text
