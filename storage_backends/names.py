"""Names inside a store: what one may look like.

Belongs here: the check that every ``ByteStore`` of this package makes before it touches its
medium. Does not belong here: which names a checkpoint uses (``dcp_engine.format.names``).
"""

from __future__ import annotations

from dcp_engine.errors import DamagedCheckpointError

__all__ = ["split_name"]


def split_name(name: str, *, store: str) -> list[str]:
    """The parts of ``name``; ``""`` (the root) has none.

    Raises ``DamagedCheckpointError(kind="unsafe_path")`` for a name that is absolute, has an
    empty part, ``.``, ``..``, a NUL or a backslash: such a name comes from a manifest that nobody
    of ours wrote, or would leave the root.
    """
    if name == "":
        return []
    parts = name.split("/")
    if "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise DamagedCheckpointError(
            "a file name leaves the checkpoint",
            kind="unsafe_path",
            checkpoint=store,
            file=name,
            hint="do not trust this checkpoint; take another one",
        )
    return parts
