"""The save id of a save without collectives, which all ranks come to without talking."""

from __future__ import annotations

import xxhash

from dcp_engine.coordination.identity import run_identity
from dcp_engine.engine.sessions import Place
from dcp_engine.errors import UsageError
from dcp_engine.format.names import is_save_id, new_save_id

__all__ = ["SaveIds"]


class SaveIds:
    """Counts the collective-free saves of one engine; every rank makes them in one order."""

    def __init__(self) -> None:
        self._saves = 0

    def choose(self, place: Place, *, use_collectives: bool, given: str | None) -> str | None:
        """The id of the next save; None where the coordinator is going to make one.

        Raises ``UsageError`` for an id that cannot be used, or where none can be made.
        """
        if not use_collectives:
            return self._shared(place, given)
        if given is not None:
            raise UsageError(
                "save_id is for use_collectives=False; with collectives the coordinator makes one",
                hint="leave save_id out",
            )
        return None

    def _shared(self, place: Place, given: str | None) -> str:
        if given is not None:
            if not is_save_id(given):
                raise UsageError(
                    f"save_id {given!r} is not 32 hexadecimal digits",
                    hint="use uuid.uuid4().hex, the same on all ranks",
                )
            return given
        number, self._saves = self._saves, self._saves + 1
        identity = run_identity(place.name)
        if place.world_size == 1 and not identity.run_id:
            return new_save_id()
        if not identity.run_id:
            raise UsageError(
                "without collectives the ranks need a save id that they share, and this job has "
                "no run id to make one of",
                hint="pass save_id= (32 hexadecimal digits, the same on all ranks, new for each "
                "save), or start the job with torchrun --rdzv-id",
            )
        words = (identity.run_id, identity.restart_count, place.name, number)
        return xxhash.xxh3_128_hexdigest(repr(words).encode())
