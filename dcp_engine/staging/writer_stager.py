"""Writers that stage: DCP's file system writer is a stager too, and its subclasses override that.

Belongs here: what the engine's own writers inherit, and which writers are asked to stage. Does not
belong here: the stagers (``stagers``) and writing.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from dcp_engine.metadata import STATE_DICT_TYPE
from dcp_engine.staging.stagers import AsyncStager, BlockingAsyncStager

__all__ = ["WriterStager", "stager_of"]


class WriterStager(AsyncStager):
    """For writers: ``async_save`` asks one to stage if it overrides ``stage``. Others leave it to
    the engine, which knows a faster way."""

    def stage(self, state_dict: STATE_DICT_TYPE) -> Future[STATE_DICT_TYPE] | STATE_DICT_TYPE:
        """A copy of ``state_dict``, in fresh memory; what overrides this calls it for that."""
        following: Any = super().stage  # type: ignore[safe-super]  # is looked at before
        if getattr(following, "__func__", None) is AsyncStager.stage:
            return BlockingAsyncStager().stage(state_dict)
        # That of a stager which a subclass has for a second base.
        staged: Future[STATE_DICT_TYPE] | STATE_DICT_TYPE = following(state_dict)
        return staged


def stager_of(writer: object) -> AsyncStager | None:
    """``writer``, if it stages in a way of its own."""
    if not isinstance(writer, AsyncStager):
        return None
    asked = getattr(writer.stage, "__self__", None)  # not ``writer`` where that hands calls on
    if isinstance(asked, WriterStager) and not _overrides_stage(type(asked)):
        return None
    return writer


def _overrides_stage(cls: type) -> bool:
    return any("stage" in vars(c) for c in cls.__mro__ if c not in (WriterStager, AsyncStager))
