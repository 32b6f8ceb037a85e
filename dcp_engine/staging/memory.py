"""How much memory this machine and this process's cgroups have left.

Asked before staging memory is touched: pages of shared memory that cannot be had end in SIGBUS or
the out-of-memory killer, never in an error that Python sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dcp_engine.errors import StagingError

__all__ = ["available_memory", "require_memory"]

RESERVE = 64 << 20
"""Bytes that are left alone: page tables of a large arena, and whatever else happens meanwhile."""

_LIMIT_FILES = (
    # (controller directory, limit, usage, the line of memory.stat that can be reclaimed)
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def require_memory(nbytes: int, *, available: int | None = None) -> None:
    """Refuse to take ``nbytes`` more than there is.

    A best effort: other processes take memory too, and ranks of one machine may all look before
    any of them takes its part.

    Args:
        available: bytes; by default what ``available_memory`` finds.

    Raises ``StagingError(kind="out_of_memory")``.
    """
    if nbytes <= 0:
        return
    if available is None:
        available = available_memory()
    if available is not None and nbytes + RESERVE > available:
        raise StagingError(
            f"staging needs {nbytes:,} bytes more of host memory, and {available:,} are available",
            kind="out_of_memory",
            hint="save synchronously, stage a smaller state, or give the job more memory",
        )


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken without swapping, by the kernel's estimate and by the limits of the
    cgroups (version 1 and 2) that this process is in. None where nothing tells."""
    found = [*_machine(root), *_cgroups(root)]
    return max(0, min(found)) if found else None


def _machine(root: Path) -> Iterator[int]:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _cgroups(root: Path) -> Iterator[int]:
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            kind = _LIMIT_FILES[1 if controllers else 0]
            group = mounts / kind[0] / path.strip("/")
            # The limits of all levels hold. Inside a container the own level is the mount's root,
            # and the path may lead nowhere.
            while True:
                yield from _room(group, *kind[1:])
                if group in (mounts, mounts / kind[0]):
                    break
                group = group.parent


def _room(group: Path, limit_name: str, usage_name: str, reclaimable_name: str) -> Iterator[int]:
    limit, usage = _read(group / limit_name).strip(), _read(group / usage_name).strip()
    if not limit.isdecimal() or not usage.isdecimal():  # "max", or no such file
        return
    reclaimable = 0
    for line in _read(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == reclaimable_name:
            reclaimable = int(value)
    yield int(limit) - int(usage) + reclaimable


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # another system, or not ours to read: this source says nothing
        return ""
