"""``dcp_engine.open``: lazy handles that read and verify just what they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dcp_engine as dcp
from dcp_engine.loader.slicing import select
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.sharded_reader import ShardedReader
from storage_backends.testing.recording import RecordingByteStore

BLOCK = 65536


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    return {
        "w": torch.arange(300 * 40, dtype=torch.float32).reshape(300, 40),
        "large": torch.arange(1 << 20, dtype=torch.int64).reshape(4096, 256),
        "long": torch.arange(100_000, dtype=torch.float32),
        "wide": torch.arange(1 << 18, dtype=torch.int64).reshape(4, 1 << 16),
        "half": torch.arange(24, dtype=torch.bfloat16).reshape(2, 3, 4),
        "scalar": torch.tensor(7.5),
        "empty": torch.empty(0, 3),
        "step": 12,
        "big": list(range(5000)),
        "own": dcp.PerRank(torch.arange(3)),
        "pickled": Opaque(),
    }


class Opaque:
    """Has no safe encoding."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> Path:
    path = tmp_path_factory.mktemp("open") / "c"
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    return path


def opened(path: Path) -> tuple[dcp.Checkpoint, RecordingByteStore]:
    store = RecordingByteStore(FileSystemStore(path))
    return dcp.Checkpoint(ShardedReader(lambda _: store), path), store


def test_it_is_a_mapping_of_shared_names(path: Path, state: dict[str, Any]) -> None:
    ckpt, _ = opened(path)
    with ckpt:
        assert set(ckpt) == set(state) - {"own"}
        assert len(ckpt) == len(state) - 1
        assert "w" in ckpt and "own" not in ckpt and "nothing" not in ckpt
        with pytest.raises(KeyError):
            ckpt["nothing"]
        assert ckpt.per_rank_names == ("own",)
        assert torch.equal(ckpt.per_rank("own")[0][...], torch.arange(3))
        with pytest.raises(KeyError):
            ckpt.per_rank("w")


def test_a_handle_reads_nothing_before_it_is_indexed(path: Path) -> None:
    ckpt, store = opened(path)
    with ckpt:
        before = len(store.calls)
        handle = ckpt["large"]
        assert handle.shape == (4096, 256)
        assert handle.dtype == torch.int64
        assert len(store.calls) == before


INDICES: list[Any] = [
    ...,
    slice(None),
    5,
    -1,
    (slice(10, 20), slice(None, None, 2)),
    (slice(None, None, 7), 3),
    (slice(1, 290, 100), slice(3, 30, 9)),
    (..., 0),
    (slice(5, 5),),
    (slice(-10, None), ...),
    (299, 39),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing_is_torch_indexing(path: Path, state: dict[str, Any], index: Any) -> None:
    ckpt, _ = opened(path)
    with ckpt:
        handle = ckpt["w"]
        assert isinstance(handle, dcp.LazyTensor)
        found = handle[index]
        assert found.shape == state["w"][index].shape
        assert torch.equal(found, state["w"][index])


@pytest.mark.parametrize("name", ["half", "scalar", "empty"])
def test_whole_tensors_of_any_shape(path: Path, state: dict[str, Any], name: str) -> None:
    ckpt, _ = opened(path)
    with ckpt:
        handle = ckpt[name]
        assert isinstance(handle, dcp.LazyTensor)
        assert torch.equal(handle[...], state[name])


def test_a_row_range_reads_its_blocks_and_no_others(path: Path, state: dict[str, Any]) -> None:
    ckpt, store = opened(path)
    with ckpt:
        handle = ckpt["large"]
        assert isinstance(handle, dcp.LazyTensor)
        handle[0]  # header and digests are read once
        before = store.nbytes("read")
        rows = handle[1000:1100]
        assert torch.equal(rows, state["large"][1000:1100])
        assert store.nbytes("read") - before <= rows.numel() * 8 + 2 * BLOCK


STEPS: list[tuple[str, Any]] = [
    *(("long", slice(start, None, step)) for start in (0, 7) for step in (2, 4, 100, 20_000)),
    *(("large", slice(1, None, step)) for step in (2, 4, 31, 32, 33, 64, 1000)),
    ("large", (slice(None, None, 64), slice(None, None, 3))),
    ("large", (slice(None, 100, 2), slice(3, None, 100))),
    ("wide", (slice(None), slice(None, None, 1 << 14))),
    ("wide", (slice(None, None, 2), slice(5, None, 20_000))),
    ("wide", (slice(None, None, 3), slice(None, None, 2))),
]


@pytest.mark.parametrize("held", [1 << 25, 1 << 16], ids=["one portion", "portions"])
@pytest.mark.parametrize(("name", "index"), STEPS, ids=str)
def test_steps_read_the_blocks_they_touch(
    path: Path,
    state: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    index: Any,
    held: int,
) -> None:
    monkeypatch.setattr("dcp_engine.loader.random_access._HELD_BYTES", held)
    ckpt, store = opened(path)
    tensor = state[name]
    at = torch.arange(tensor.numel()).reshape(tensor.shape)[index] * tensor.element_size()
    touched = sum(
        min(BLOCK, tensor.nbytes - block * BLOCK) for block in (at // BLOCK).unique().tolist()
    )
    with ckpt:
        handle = ckpt[name]
        assert isinstance(handle, dcp.LazyTensor)
        handle[0]  # header and digests are read once
        before = store.nbytes("read")
        assert torch.equal(handle[index], tensor[index])
        read = store.nbytes("read") - before
    if held == 1 << 25:
        assert read == touched
    else:
        assert touched <= read <= 2 * touched  # portions may share a block


def test_a_step_takes_memory_for_what_it_keeps(
    path: Path, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcp_engine.loader.random_access._HELD_BYTES", 1 << 17)
    taken: list[int] = []
    memory = dcp.Checkpoint._memory

    def counted(self: dcp.Checkpoint, *args: Any) -> torch.Tensor:
        made = memory(self, *args)
        taken.append(made.nbytes)
        return made

    monkeypatch.setattr(dcp.Checkpoint, "_memory", counted)
    ckpt, _ = opened(path)
    with ckpt:
        found = ckpt["large"][:, ::128]  # type: ignore[index]
    assert torch.equal(found, state["large"][:, ::128])
    assert taken == [found.nbytes, taken[-1]]  # one buffer, used again
    assert taken[-1] <= 1 << 17


@given(data=st.data())
def test_selection_is_what_torch_selects(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=3)))
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    index: list[Any] = []
    for size in shape[: data.draw(st.integers(0, len(shape)))]:
        one = st.slices(size).filter(lambda s: (s.step or 1) > 0)
        index.append(data.draw(one | st.integers(-size, size - 1) if size else one))
    chosen = select(shape, tuple(index), name="t")
    assert chosen.shape == tensor[tuple(index)].shape
    box = tensor[
        tuple(
            slice(s, s + e, k)
            for s, e, k in zip(chosen.starts, chosen.extents, chosen.steps, strict=True)
        )
    ]
    assert torch.equal(box.reshape(chosen.shape), tensor[tuple(index)])


@pytest.mark.parametrize("index", [(0, 0, 0), 300, -301, (..., ...)])
def test_indices_that_do_not_fit(path: Path, index: Any) -> None:
    ckpt, _ = opened(path)
    with ckpt, pytest.raises(IndexError, match="w"):
        ckpt["w"][index]  # type: ignore[index]


@pytest.mark.parametrize("index", [[0, 1], None, True, torch.tensor([0]), slice(None, None, -1)])
def test_indices_that_need_memory_are_refused(path: Path, index: Any) -> None:
    ckpt, _ = opened(path)
    with ckpt, pytest.raises(dcp.UsageError):
        ckpt["w"][index]  # type: ignore[index]


def test_objects_are_loaded_when_asked_and_pickles_only_by_name(path: Path) -> None:
    ckpt, _ = opened(path)
    with ckpt:
        step, big, pickled = ckpt["step"], ckpt["big"], ckpt["pickled"]
        assert isinstance(step, dcp.LazyObject)
        assert isinstance(big, dcp.LazyObject)
        assert isinstance(pickled, dcp.LazyObject)
        assert step.load() == 12
        assert big.load() == list(range(5000))
        with pytest.raises(dcp.UnsafeContentError) as refused:
            pickled.load()
        assert refused.value.kind == "pickle_refused"
        assert pickled.load(allow_pickle=True) == Opaque()


def test_mmap_is_copy_on_write(path: Path, state: dict[str, Any]) -> None:
    ckpt, _ = opened(path)
    with ckpt:
        mapped = ckpt.mmap("large")
        assert torch.equal(mapped, state["large"])
        mapped[0, 0] = -1
        assert torch.equal(ckpt["large"][0], state["large"][0])  # type: ignore[index]
        assert ckpt.mmap("empty").shape == (0, 3)


def test_mmap_checks_the_size_of_the_file(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(5)}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    (file,) = tmp_path.glob("data-*/*.safetensors")
    with file.open("r+b") as opened_file:
        opened_file.truncate(file.stat().st_size - 1)
    with dcp.Checkpoint(dcp.FileSystemReader(tmp_path), tmp_path) as ckpt:
        with pytest.raises(dcp.DamagedCheckpointError) as short:
            ckpt.mmap("w")
        assert short.value.kind == "file_short"


def test_a_checkpoint_replaced_meanwhile_is_superseded(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        state = {"w": torch.full((5,), value)}
        if value == 2.0:
            ckpt = dcp.Checkpoint(dcp.FileSystemReader(tmp_path), tmp_path)
        dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    with ckpt, pytest.raises(dcp.ConflictError) as replaced:
        ckpt["w"][...]  # type: ignore[index]
    assert replaced.value.kind == "superseded"


def test_damage_is_seen_in_the_part_that_is_read(tmp_path: Path) -> None:
    state = {"w": torch.arange(1 << 16, dtype=torch.int64)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    (file,) = tmp_path.glob("data-*/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with dcp.Checkpoint(dcp.FileSystemReader(tmp_path), tmp_path) as ckpt:
        handle = ckpt["w"]
        assert isinstance(handle, dcp.LazyTensor)
        assert torch.equal(handle[:100], state["w"][:100])
        with pytest.raises(dcp.DamagedCheckpointError) as damage:
            handle[-1]
        assert damage.value.kind == "digest_mismatch"
        assert damage.value.tensor == "w"


def test_a_closed_checkpoint_says_so(path: Path) -> None:
    ckpt, _ = opened(path)
    handle = ckpt["w"]
    ckpt.close()
    ckpt.close()
    with pytest.raises(dcp.UsageError, match="closed"):
        handle[0]  # type: ignore[index]


@pytest.mark.parametrize("index", [..., (slice(None), slice(None, None, 2))], ids=str)
def test_another_default_device_changes_nothing(
    path: Path, state: dict[str, Any], index: Any
) -> None:
    with torch.device("meta"):
        ckpt, _ = opened(path)
        with ckpt:
            found = ckpt["w"][index]  # type: ignore[index]
            assert ckpt.mmap("empty").is_cpu
    assert torch.equal(found, state["w"][index])


def test_steps_of_dtypes_without_a_copy_kernel(tmp_path: Path) -> None:
    stored = torch.arange(60, dtype=torch.uint8).reshape(6, 10)
    dcp.save(
        {"w": stored.view(torch.uint4)},
        storage_writer=dcp.FileSystemWriter(tmp_path),
        no_dist=True,
    )
    ckpt, _ = opened(tmp_path)
    with ckpt, torch.inference_mode():
        found = ckpt["w"][1::2, ::3]  # type: ignore[index]
    assert found.dtype == torch.uint4
    assert torch.equal(found.view(torch.uint8), stored[1::2, ::3])


def test_what_cannot_be_opened_is_closed(tmp_path: Path) -> None:
    store = RecordingByteStore(FileSystemStore(tmp_path))
    closed: list[bool] = []
    store.close = lambda: closed.append(True)  # type: ignore[method-assign]
    with pytest.raises(dcp.NotFoundError):
        dcp.Checkpoint(ShardedReader(lambda _: store), tmp_path)
    assert closed == [True]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(dcp.NotFoundError) as missing:
        dcp.Checkpoint(dcp.FileSystemReader(tmp_path / "no"), tmp_path / "no")
    assert missing.value.kind == "not_found"
