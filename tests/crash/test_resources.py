"""For real: no space, no inodes, no right to write, no descriptors, no memory.

Each time: the save raises and says what is missing, what was there before loads whole, nothing is
left lying about, and the next save works when there is room again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import dcp_engine as dcp
from storage_backends.testing.crash import jobs as small
from tests.crash import jobs
from tests.crash.fork_server import ForkServer, Words
from tests.crash.mounts import remount, tmpfs

pytestmark = pytest.mark.multirank

PAGE = 4096


def tried(root: Path, label: str) -> str | None:
    """Save the small checkpoint ``label``; None, or the kind of the error."""
    try:
        small.save_alone(root, label)
    except dcp.CheckpointException as error:
        if "disk_full" in error.kind:
            assert "ree space" in str(error), "it says what to do"
        return error.kind
    return None


def entries(root: Path) -> list[str]:
    return sorted(os.path.relpath(path, root) for path in root.rglob("*"))


def overwrite_in(root: Path) -> str | None:
    """Save "old", which may fail, and "new" over it, which may fail, and check what is there."""
    first = tried(root, "old")
    before = small.NONE if first else "old"
    assert small.read(root) == before
    if first:
        assert first == "disk_full"
        assert not any(path.is_file() for path in root.rglob("*"))
    held = entries(root)
    second = tried(root, "new")
    if second is None:
        assert small.read(root) == "new"
    else:
        assert second == "disk_full"
        assert small.read(root) == before
        left = entries(root)
        assert left == held or not any(path.is_file() for path in root.rglob("*"))
    return second


# From too little for one checkpoint to enough for two, in pages: some step fails at each.
SIZES = range(2, 34)


def test_a_full_disk(tmp_path: Path) -> None:
    outcomes = []
    for pages in SIZES:
        with tmpfs(tmp_path / "disk", f"size={pages * PAGE}") as root:
            outcomes.append(overwrite_in(root))
            remount(root, "size=4m")
            assert tried(root, "next") is None
            assert small.read(root) == "next"
            assert len(os.listdir(root / small.CHECKPOINT)) == 2
    assert outcomes.count("disk_full") >= 10
    assert outcomes[-1] is None, "at last there is room"


def test_no_inodes(tmp_path: Path) -> None:
    outcomes = []
    for inodes in range(2, 22):
        with tmpfs(tmp_path / "disk", f"size=4m,nr_inodes={inodes}") as root:
            outcomes.append(overwrite_in(root))
            remount(root, "nr_inodes=1000")
            assert tried(root, "next") is None
            assert small.read(root) == "next"
    assert outcomes.count("disk_full") >= 10
    assert outcomes[-1] is None


def test_a_full_disk_under_two_ranks(
    server: ForkServer, port: int, words: Words, tmp_path: Path
) -> None:
    """Both raise, and what both wrote is gone."""
    with tmpfs(tmp_path / "disk", "size=2600k") as root:
        path = root / "checkpoint"
        assert jobs.save_alone(str(path), 1.0) is None
        (filler := root / "filler").write_bytes(bytes(900 << 10))
        held = entries(root)
        children = [
            server.start(
                jobs.save_for_ever, words, rank, 2, port, str(root), str(path), 2.0, 1, 60.0
            )
            for rank in range(2)
        ]
        assert words.listen(lambda: all(c.ended for c in children), 60.0, children=children)
        words.listen(lambda: False, 0.0)
        said = sorted(word for word in words.heard if word[0] == "failed")
        for child in children:
            child.close()
        assert said == [["failed", rank, 2.0, "disk_full"] for rank in range(2)], words.heard
        assert jobs.load_alone(str(path)) == 1.0
        assert entries(root) == held
        filler.unlink()
        assert jobs.save_alone(str(path), 3.0) is None
        assert jobs.load_alone(str(path)) == 3.0


def test_a_read_only_mount(tmp_path: Path) -> None:
    """What is there can be loaded; a save is refused before anything happens."""
    with tmpfs(tmp_path / "disk", "size=4m") as root:
        small.save_alone(root, "old")
        held = entries(root)
        remount(root, "ro")
        assert small.read(root) == "old"
        assert tried(root, "new") == "permission_denied"
        with pytest.raises(dcp.StorageError) as caught:
            dcp.prune(root, older_than=-1.0)
            raise dcp.StorageError("nothing to prune", kind="permission_denied")
        assert caught.value.kind == "permission_denied"
        remount(root, "rw")
        assert entries(root) == held
        assert tried(root, "next") is None


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """One that everybody may look into, and only we may change."""
    root = Path(tempfile.mkdtemp(prefix="dcp-engine-public-"))
    root.chmod(0o755)
    yield root
    shutil.rmtree(root)


def test_a_directory_that_we_may_not_write(
    server: ForkServer, words: Words, public_directory: Path
) -> None:
    if os.geteuid():
        pytest.skip("only root can become somebody else")
    path = str(public_directory / "checkpoint")
    assert jobs.save_alone(path, 1.0) is None
    held = entries(public_directory)
    said = heard(server, words, jobs.as_nobody, path, 2.0)
    (word, saved, loaded), *rest = said
    assert word == "tried" and not rest, said
    assert saved.startswith("permission_denied"), saved
    assert path in saved
    assert loaded == 1.0
    assert entries(public_directory) == held


def heard(server: ForkServer, words: Words, function: object, *args: object) -> list[list[object]]:
    """What a child that runs ``function(say, *args)`` says until it ends."""
    child = server.start(function, words, *args)  # type: ignore[arg-type]
    ended = words.listen(lambda: child.ended, 90.0, children=[child])
    stacks = "" if ended else child.stacks()
    child.close()
    assert ended, f"it hangs: {stacks}"
    words.listen(lambda: False, 0.0)
    return words.heard


def test_no_descriptors(server: ForkServer, words: Words, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    assert jobs.save_alone(path, 1.0) is None
    said = heard(server, words, jobs.with_few_descriptors, path, 2.0, 12)
    assert [word[0] for word in said] == ["tried"] * 13 + ["at last"], said
    expected = 2.0  # saved before the descriptors were taken
    open_files = {word[5] for word in said[:-1]}
    for _, left, saved, loaded, afterwards, _ in said[:-1]:
        if saved is None:
            expected = 2.0 + left  # type: ignore[operator]
        else:
            assert "io_error" in str(saved) and "ulimit -n" in str(saved), saved
        assert loaded == expected or "ulimit -n" in str(loaded), loaded
        assert afterwards == expected
    assert said[0][2] is not None, "without one descriptor nothing can be saved"
    assert said[12][2] is None, "with twelve it can"
    assert len(open_files) == 1, f"descriptors leak: {open_files}"
    assert said[-1] == ["at last", None, 1.0]
    # Without descriptors nothing can be tidied up either.
    dcp.prune(path, older_than=-1.0)
    assert len(os.listdir(path)) == 2


def test_files_may_not_get_large(server: ForkServer, words: Words, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    assert jobs.save_alone(path, 1.0) is None
    held = sorted(os.listdir(path))
    sizes = [0, 1, 100, 4096, 5000, 500_000, 960_000]
    for word, size, saved, loaded, left in heard(
        server, words, jobs.with_small_files, path, 2.0, sizes
    ):
        assert word == "tried", word
        assert str(saved).startswith("disk_full"), (size, saved)
        assert loaded == 1.0
        assert left == held


@pytest.mark.parametrize("spare", [0, 1 << 20, 12 << 20, 40 << 20, 160 << 20])
def test_little_address_space(server: ForkServer, words: Words, tmp_path: Path, spare: int) -> None:
    """It works, or it raises; and what is there can be loaded when there is memory again."""
    path = str(tmp_path / "checkpoint")
    dcp.save({"w": jobs.large(1.0)}, checkpoint_id=path, no_dist=True)
    said = heard(server, words, jobs.with_little_memory, path, 2.0, spare)
    assert [word[0] for word in said] == ["tried", "now"], said
    (_, saved, loaded), (_, again, values) = said
    print(f"\n{spare >> 20} MiB: save {saved}\nload {loaded}")
    assert again is None
    assert values == ([1.0] if saved else [2.0])
    if spare >= 160 << 20:
        assert (saved, loaded) == (None, None)
