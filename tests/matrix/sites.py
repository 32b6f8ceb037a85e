"""The calls that a save or a load makes into writers, readers, planners, stores and state.

Belongs here: where a fault can strike, who calls there, and how far the operation is by then. Does
not belong here: faults (``strike``), and combining them (``cases``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["SITES", "Site"]

DATA = "data-*/rank*.safetensors"
DIGESTS = "data-*/rank*.digests"
DIRECTORY = "data-????????????????????????????????"
OWNER = "data-*/owner.json"
TEMPORARY = "data-*/manifest.json.tmp"
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Site:
    """One call."""

    operation: str
    path: Literal["columns", "items"]
    subject: Literal["writer", "reader", "planner", "store", "stateful", "stager"]
    method: str
    phase: str
    """Of the operation, as its deadlines call it; ``"failed"`` is the clean-up after a failure,
    ``"over"`` what is left to do when the outcome is known to all, ``"closing"`` what may fail
    without doing harm, while others wait."""
    name: str = "*"
    """Of the file, for the calls of a store."""
    who: Literal["all", "coordinator", "others"] = "all"
    """Which ranks call it."""
    nth: int = 1
    """Which call of the operation is struck."""
    alone: bool = True
    """A rank that loads or saves alone makes this call too."""
    outside: bool = False
    """Lies before the first step: a rank that fails there raises what was raised."""
    together: bool = True
    """All ranks call it in one step, so that all can fail in it at once."""
    commit: Literal["before", "decided", "after"] = "before"
    """Where the call lies to the decision to commit."""
    futures: bool = False
    """Returns a future."""
    first: str = ""
    """``subject.method`` that fails first, on one rank: the call is part of the clean-up."""

    @property
    def label(self) -> str:
        where = f"{self.subject}.{self.method}"
        if self.name != "*":
            where += f"({self.name})"
        if self.first:
            where += f" once {self.first} failed"
        return f"{self.operation}/{self.path}/{where}"

    @property
    def in_worker(self) -> bool:
        """The call is made in a worker process, whose death its rank survives."""
        return self.operation == "async process" and self.subject in ("writer", "planner", "store")


_COLUMN_SAVE = Site(operation="save", path="columns", subject="writer", method="", phase="agree")
_ITEM_SAVE = replace(_COLUMN_SAVE, path="items", phase="plan")
_COLUMN_LOAD = replace(_COLUMN_SAVE, operation="load", subject="reader", phase="metadata")
_ITEM_LOAD = replace(_COLUMN_LOAD, path="items", phase="plan")


def _site(base: Site, method: str, phase: str = "", /, **changes: object) -> Site:
    return replace(base, method=method, phase=phase or base.phase, **changes)  # type: ignore[arg-type]


def _column_save() -> list[Site]:
    s, at = _COLUMN_SAVE, _site
    writer = [
        at(s, "takes_columns", outside=True),
        at(s, "reset"),
        at(s, "observe", who="coordinator"),
        at(s, "begin_save", together=False),
        at(s, "write_columns", "write"),
        at(s, "commit_columns", "commit", who="coordinator", commit="decided"),
        at(s, "remove_replaced", "over", who="coordinator", commit="after"),
        at(s, "manifest_source", "over", commit="after"),
        at(s, "end_save", "over", commit="after"),
        at(s, "abort_save", "failed", first="writer.write_columns"),
        at(s, "leave_in_doubt", "failed", first="writer.commit_columns", commit="decided"),
    ]
    t = replace(s, subject="store")
    here = {"who": "coordinator"}
    store = [
        at(t, "make_directory", name=DIRECTORY, together=False),
        at(t, "put", name=OWNER, **here),
        *(at(t, call, "write", name=DATA) for call in ("create", "write", "sync", "close", "size")),
        *(at(t, call, "write", name=DIGESTS) for call in ("create", "write", "sync", "close")),
        at(t, "sync_directory", "write", name=DIRECTORY),
        at(t, "size", name=MANIFEST, **here),
        at(t, "read", name=MANIFEST, **here),
        *(
            at(t, call, "commit", name=TEMPORARY, commit="decided", **here)
            for call in ("create", "write", "sync", "close")
        ),
        at(t, "replace", "commit", name=MANIFEST, commit="decided", **here),
        at(t, "sync_directory", "commit", name="", commit="decided", **here),
        at(t, "list", "over", name="data-", commit="after", **here),
        at(t, "delete", "over", name=DATA, commit="after", **here),
        at(t, "close_store", "over", commit="after"),
        at(t, "list", "failed", name="data-*/", first="writer.write_columns"),
        at(t, "delete", "failed", first="writer.write_columns after"),
        at(t, "abort", "write", name=DATA, first="store.write", who="others"),
        at(t, "close_store", "failed", first="writer.write_columns"),
    ]
    return [*writer, *store, at(replace(s, subject="stateful"), "state_dict")]


def _item_save() -> list[Site]:
    s, at = _ITEM_SAVE, _site
    here = {"who": "coordinator"}
    writer = [
        at(s, "reset"),
        at(s, "storage_meta"),
        at(s, "announce"),
        at(s, "set_up_storage_writer"),
        at(s, "prepare_local_plan"),
        at(s, "prepare_global_plan", **here),
        at(s, "write_data", "write", futures=True),
        at(s, "finish", "commit", commit="decided", **here),
        at(s, "abort", "failed", first="writer.write_data"),
        at(s, "leave_in_doubt", "failed", first="writer.finish", commit="decided"),
    ]
    p = replace(s, subject="planner")
    planner = [
        at(p, "set_up_planner"),
        at(p, "create_local_plan"),
        at(p, "create_global_plan", **here),
        at(p, "finish_plan", "write"),
        at(p, "resolve_data", "write"),
    ]
    return [*writer, *planner]


def _column_load() -> list[Site]:
    s, at = _COLUMN_LOAD, _site
    reader = [
        at(s, "takes_columns", outside=True),
        at(s, "reset"),
        at(s, "open_checkpoint"),
        at(s, "local_data_file", "plan", alone=False),
        at(s, "read_object", "read"),
        at(s, "read_columns", "read"),
        # The first two calls come with reset and open_checkpoint.
        at(s, "close_checkpoint", "closing", nth=3),
        at(s, "close_checkpoint", "failed", nth=3, first="reader.read_columns"),
    ]
    t = replace(s, subject="store")
    store = [
        at(t, "size", name=MANIFEST),
        at(t, "read", name=MANIFEST),
        at(t, "read", "read", name=DIGESTS),
        at(t, "read", "read", name=DATA),
        at(t, "size", "plan", name=DATA),
        at(t, "close_store", "closing"),
    ]
    v = replace(s, subject="stateful")
    return [*reader, *store, at(v, "state_dict", "plan"), at(v, "load_state_dict", "restore")]


def _item_load() -> list[Site]:
    s, at = _ITEM_LOAD, _site
    here = {"who": "coordinator"}
    reader = [
        at(s, "reset"),
        at(s, "read_metadata"),
        at(s, "set_up_storage_reader"),
        at(s, "prepare_local_plan"),
        at(s, "prepare_global_plan", **here),
        at(s, "read_data", "read", futures=True),
        at(s, "close_checkpoint", "closing", nth=3),
    ]
    p = replace(s, subject="planner")
    planner = [
        at(p, "set_up_planner"),
        at(p, "create_local_plan"),
        at(p, "create_global_plan", **here),
        at(p, "finish_plan", "read"),
        at(p, "load_bytes", "read"),
        at(p, "resolve_tensor", "read"),
        at(p, "commit_tensor", "read"),
    ]
    return [*reader, *planner]


def _async_save(operation: str) -> list[Site]:
    """Those of a save, elsewhere, and what happens at the call."""
    saves = [replace(site, operation=operation) for site in (*_column_save(), *_item_save())]
    here = ("takes_columns", "manifest_source") if operation == "async process" else ()
    stager = replace(_COLUMN_SAVE, operation=operation, subject="stager", outside=True)
    return [
        *(
            replace(site, outside=True) if site.subject == "stateful" else site
            for site in saves
            if site.method not in here
        ),
        _site(stager, "stage", "staging", futures=True),
        _site(stager, "synchronize_staging", "staging"),
        _site(stager, "should_synchronize_after_execute", "staging"),
    ]


SITES: tuple[Site, ...] = (
    *_column_save(),
    *_item_save(),
    *_column_load(),
    *_item_load(),
    *_async_save("async thread"),
    *_async_save("async process"),
)
