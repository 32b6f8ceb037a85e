"""The newest checkpoint that is whole: which places count, their order, what is passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dcp_engine as dcp
from dcp_engine.errors import DamagedCheckpointError, NotFoundError
from dcp_engine.loader.latest import Candidate, choose_latest, join_place, places_of
from dcp_engine.registry import is_chained
from storage_backends.filesystem_store import path_of

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


def test_an_unreadable_directory_is_a_place_or_belongs_to_one() -> None:
    names = ["lost+found/", f"step-1/{DATA}/extra/", f"step-2/{DATA}/", f"{DATA}/extra/"]
    assert places_of(names) == ["step-1", "step-2"]
    assert places_of(names, names) == ["lost+found", "step-1", "step-2"]


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("/runs/", "/runs/a/b"),
        ("s3://bucket/runs?endpoint_url=http://x", "s3://bucket/runs/a/b?endpoint_url=http://x"),
        ("/what?/runs", "/what?/runs/a/b"),
        ("file:///runs/", "file:///runs/a/b"),
        ("file:///runs?sync=1#top", "file:///runs/a/b?sync=1#top"),
        ("file:/runs#top", "file:/runs/a/b#top"),
    ],
)
def test_a_place_below_a_root(root: str, expected: str) -> None:
    assert join_place(root, "a/b") == expected


STRANGE_NAMES = ["lr1%41", "a#1", "c?x", "a::b", "d e", "e\n\t", "ü", "\udcff%41", "[x]"]


@pytest.mark.parametrize("place", STRANGE_NAMES)
@pytest.mark.parametrize("root", ["/runs", "file:///runs", "file:/runs", "file://localhost/runs/"])
def test_a_place_is_the_directory_of_that_name(root: str, place: str) -> None:
    joined = join_place(root, f"{place}/step-1")
    assert path_of(joined) == f"/runs/{place}/step-1"
    assert not is_chained(joined)


@pytest.mark.parametrize("url", [False, True])
def test_the_newest_lies_in_a_directory_with_a_strange_name(tmp_path: Path, url: bool) -> None:
    for value, name in enumerate(["lr1A", "lr1%41"]):
        path = tmp_path / name / "step-1"
        state = {"w": torch.full((2,), float(value))}
        dcp.save(state, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    root = f"file://{tmp_path}" if url else str(tmp_path)
    loaded = {"w": torch.zeros(2)}
    report = dcp.load(loaded, latest_in=root, no_dist=True)
    assert loaded["w"].tolist() == [1.0, 1.0]
    assert report.latest is not None and report.latest.passed_over == ()
    with dcp.open(report.latest.checkpoint) as ckpt:
        assert ckpt.save_id == report.latest.save_id


def test_links_below_the_root_are_not_followed_the_root_may_be_one(tmp_path: Path) -> None:
    for name in ("runs/a", "elsewhere/b"):
        writer = dcp.FileSystemWriter(tmp_path / name)
        dcp.save({"w": torch.ones(2)}, storage_writer=writer, no_dist=True)
    (tmp_path / "runs" / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    found = dcp.latest(tmp_path / "link")
    assert found.checkpoint == str(tmp_path / "link" / "a")
    assert found.passed_over == ()


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
