"""The newest checkpoint that is whole: which places count, their order, what is passed over."""

from __future__ import annotations

import pytest

from dcp_engine.errors import DamagedCheckpointError, NotFoundError
from dcp_engine.loader.latest import Candidate, choose_latest, join_place, places_of

DATA = "data-" + "0" * 32


def test_places() -> None:
    names = [
        "step-1/manifest.json",
        f"step-1/{DATA}/rank00000-00.safetensors",
        "deep/run/step-2/manifest-rank00000.json",
        f"begun/{DATA}/",
        f"trick/{DATA}/extra/manifest.json",
        "other/notes.txt",
        "manifest.json",
    ]
    assert places_of(names) == ["begun", "deep/run/step-2", "step-1", "trick"]


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("/runs/", "/runs/a/b"),
        ("s3://bucket/runs?endpoint_url=http://x", "s3://bucket/runs/a/b?endpoint_url=http://x"),
        ("/what?/runs", "/what?/runs/a/b"),
    ],
)
def test_a_place_below_a_root(root: str, expected: str) -> None:
    assert join_place(root, "a/b") == expected


def choose(times: dict[str, float], bad: set[str], unreadable: set[str] | None = None) -> object:
    looked: list[str] = []

    def look(checkpoint: str) -> Candidate:
        if checkpoint in (unreadable or set()):
            raise NotFoundError("begun only", kind="not_committed")
        return Candidate(checkpoint=checkpoint, save_id="0" * 32, committed_at=times[checkpoint])

    def verify(checkpoint: str) -> None:
        looked.append(checkpoint)
        if checkpoint in bad:
            raise DamagedCheckpointError("broken", kind="file_missing")

    found = choose_latest([*times], look, verify, root="r")
    return found.checkpoint, [(p.checkpoint, p.kind) for p in found.passed_over], looked


def test_the_newest_that_is_whole() -> None:
    times = {"a": 1.0, "b": 3.0, "c": 2.0}
    assert choose(times, set()) == ("b", [], ["b"])
    assert choose(times, {"b"}) == ("c", [("b", "file_missing")], ["b", "c"])


def test_a_tie_goes_to_the_last_path() -> None:
    assert choose({"a": 1.0, "c": 1.0, "b": 1.0}, set()) == ("c", [], ["c"])


def test_what_has_no_manifest_is_told() -> None:
    assert choose({"a": 1.0, "x": 9.0}, set(), {"x"}) == ("a", [("x", "not_committed")], ["a"])


def test_none() -> None:
    with pytest.raises(NotFoundError, match=r"passed over: b: broken; a: broken"):
        choose({"a": 1.0, "b": 2.0}, {"a", "b"})
    with pytest.raises(NotFoundError, match="there is none"):
        choose({}, set())
