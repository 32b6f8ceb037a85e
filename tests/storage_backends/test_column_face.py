"""Whole saves and loads through the column face, compared with the tensors themselves."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dcp_engine.errors import (
    CheckpointError,
    ConflictError,
    InvalidPlanError,
    NotFoundError,
    StateMismatchError,
    StorageError,
    UsageError,
)
from dcp_engine.format.dtypes import DTYPES
from dcp_engine.storage import ReadRange
from storage_backends import tensor_bytes
from storage_backends.filesystem import FileSystemReader, FileSystemWriter
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.memory import MemoryStore
from storage_backends.sharded_reader import ShardedReader
from storage_backends.sharded_writer import ShardedWriter
from storage_backends.testing.recording import RecordingByteStore
from storage_backends.write_files import WriteOptions
from tests.storage_backends.conftest import OpenStore
from tests.storage_backends.hand_plans import (
    HandPlan,
    Shard,
    load,
    load_columns,
    load_whole,
    no_check,
    save,
    ticket,
    whole,
    write,
)

A, B = "a" * 32, "b" * 32


def writers(open_store: OpenStore, count: int = 1, **options: object) -> list[ShardedWriter]:
    return [ShardedWriter(lambda _: open_store(), "here", **options) for _ in range(count)]  # type: ignore[arg-type]


def reader(open_store: OpenStore, **options: object) -> ShardedReader:
    return ShardedReader(lambda _: open_store(), "here", **options)  # type: ignore[arg-type]


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return bytes(tensor_bytes.memory_of(flat))


def test_round_trip(open_store: OpenStore) -> None:
    state = {
        "w": torch.randn(300, 200),
        "bytes": torch.arange(7, dtype=torch.int8),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "half": torch.randn(5, 6).bfloat16(),
        "large": torch.randn(70_000),
    }
    record = save(writers(open_store), whole(state, step=3, text="x" * 10_000), A)
    assert record.save_id == A
    found = load_whole(reader(open_store), state)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("name", sorted(entry.name for entry in DTYPES.values()))
def test_every_dtype(tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, name)
    raw = torch.randint(0, 2 if name == "bool" else 256, (6 * dtype.itemsize,), dtype=torch.uint8)
    state = {"t": raw.view(dtype).reshape(2, 3)}
    save([FileSystemWriter(tmp_path)], whole(state), A)
    destination = torch.zeros(6 * dtype.itemsize, dtype=torch.uint8).view(dtype).reshape(2, 3)
    load(FileSystemReader(tmp_path), [("t", (0, 0), destination)])
    assert bits(destination) == bits(state["t"])


def test_memory_of_any_layout(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small, so that these tensors are copied in several slices that cut blocks anywhere.
    monkeypatch.setattr("storage_backends.write_files.COPY_BYTES", 1000)
    base = torch.randn(40, 60)
    state = {
        "transposed": base.t(),
        "columns": base[:, 3:50],
        "steps": base[::3, ::2],
        "expanded": base[0].expand(30, 60),
        "conj": torch.randn(30, 30, dtype=torch.complex64).conj(),
        "neg": torch.randn(9, 9, dtype=torch.complex64).conj().imag,
        "view": base[5:9],
        "permuted": torch.randn(4, 5, 6).permute(2, 0, 1),
        "grad": torch.nn.Parameter(torch.randn(4, 4)),
    }
    save(writers(open_store, block_size=512), whole(state), A)
    found = load_whole(reader(open_store), state)
    for name, tensor in state.items():
        assert bits(found[name]) == bits(tensor), name


def test_destinations_of_any_layout(open_store: OpenStore) -> None:
    state = {
        "w": torch.randn(40, 60),
        "c": torch.randn(10, 12, dtype=torch.complex128),
        "z": torch.randn(6, 4, dtype=torch.complex64),
    }
    save(writers(open_store, block_size=512), whole(state), A)
    wide = torch.zeros(80, 120)
    transposed = torch.zeros(60, 40).t()
    complex_columns = torch.zeros(12, 10, dtype=torch.complex128).t()
    conjugated = torch.zeros(6, 4, dtype=torch.complex64).conj()
    parameter = torch.nn.Parameter(torch.zeros(40, 60))
    load(
        reader(open_store),
        [
            ("w", (0, 0), wide[::2, ::2]),
            ("w", (0, 0), transposed),
            ("w", (0, 0), parameter),
            ("c", (0, 0), complex_columns),
            ("z", (0, 0), conjugated),
        ],
    )
    assert torch.equal(wide[::2, ::2], state["w"])
    assert not wide[1::2].any()
    assert torch.equal(transposed, state["w"])
    assert torch.equal(parameter.detach(), state["w"])
    assert torch.equal(complex_columns, state["c"])
    assert torch.equal(conjugated, state["z"])


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("largest_whole_block", [1 << 20, 256])
def test_resharding(
    open_store: OpenStore,
    monkeypatch: pytest.MonkeyPatch,
    verify: bool,
    threads: int,
    largest_whole_block: int,
) -> None:
    # Small enough that jobs, batches and scratch memory all come to their limits here.
    monkeypatch.setattr("storage_backends.read_files.READ_BYTES", 2048)
    monkeypatch.setattr("storage_backends.read_files.JOB_BYTES", 4096)
    monkeypatch.setattr("storage_backends.read_files.MIN_JOB", 512)
    monkeypatch.setattr("storage_backends.read_files.MAX_SPAN", 4096)
    monkeypatch.setattr("storage_backends.read_files.MAX_GAP", 256)
    monkeypatch.setattr("storage_backends.read_files.MAX_WHOLE", largest_whole_block)
    full = torch.randn(48, 100)
    parts = [
        Shard("w", (0, 0), full[:20].clone(), 0),
        Shard("w", (20, 0), full[20:, :37].clone(), 1),
        Shard("w", (20, 37), full[20:, 37:].clone(), 2),
        Shard("b", (0,), torch.arange(9), 1),
    ]
    plan = HandPlan(shapes={"w": (48, 100), "b": (9,)}, shards=parts, world_size=3)
    save(writers(open_store, 3, block_size=512), plan, A)
    boxes = [(0, 0, 48, 100), (0, 0, 48, 3), (13, 30, 20, 20), (47, 99, 1, 1), (18, 0, 4, 100)]
    wanted = [("w", (r, c), torch.zeros(h, w)) for r, c, h, w in boxes]
    wanted.append(("b", (2,), torch.zeros(5, dtype=torch.int64)))
    load(reader(open_store, verify_digests=verify, thread_count=threads), wanted)
    for (r, c, h, w), (_, _, tensor) in zip(boxes, wanted, strict=False):
        assert torch.equal(tensor, full[r : r + h, c : c + w])
    assert torch.equal(wanted[-1][2], torch.arange(2, 7))


def test_several_threads_write_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {
        "a": torch.randn(100_000),
        "t": torch.randn(300, 200).t(),
        "b": torch.randn(3, 5),
        "c": torch.randn(50_001).half(),
    }
    save([FileSystemWriter(tmp_path / "1")], whole(state), A)
    monkeypatch.setattr(
        "storage_backends.sharded_writer.WriteOptions",
        lambda **options: WriteOptions(**options, job_bytes=2 * 65536),
    )
    save([FileSystemWriter(tmp_path / "2", thread_count=4)], whole(state), A)
    for name in ("rank00000-00.safetensors", "rank00000.digests"):
        one, two = (tmp_path / d / f"data-{A}" / name for d in "12")
        assert one.read_bytes() == two.read_bytes()


def test_files_are_safetensors_with_the_documented_names(tmp_path: Path) -> None:
    full = torch.randn(4, 6)
    plan = HandPlan(
        shapes={"w": (4, 6), "n": (), "__metadata__": (2,), "odd": (2,)},
        shards=[
            Shard("w", (0, 0), full[:2].clone()),
            Shard("w", (2, 0), full[2:].clone()),
            Shard("n", (), torch.tensor(2.0)),
            Shard("__metadata__", (0,), torch.tensor([1.0, 2.0])),
            Shard("odd", (0,), torch.tensor([1 + 2j, 3], dtype=torch.complex128)),
        ],
        objects={"blob": (0, b"z" * 5000)},
    )
    save([FileSystemWriter(tmp_path)], plan, A)
    path = tmp_path / f"data-{A}" / "rank00000-00.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "dcp_engine.save_id": A}
        assert set(file.keys()) == {"w@0,0", "w@2,0", "n", "__metadata__@@1", "odd", "blob"}
        assert torch.equal(file.get_tensor("w@2,0"), full[2:])
        assert file.get_tensor("odd").dtype == torch.uint8
        assert file.get_tensor("odd").shape == (2, 16)
        assert file.get_tensor("n").shape == ()
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert (8 + length) % 4096 == 0
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    begins = sorted((v["data_offsets"], k) for k, v in header.items())
    assert (begins[0][1], begins[-1][1]) == ("odd", "blob")


def test_only_data_directories_lie_beside_the_manifest(tmp_path: Path) -> None:
    writer = FileSystemWriter(tmp_path / "c")
    save([writer], whole({"a": torch.ones(3)}), A, extra_files={"sub/config.json": b"{}"})
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [f"data-{A}", "manifest.json"]
    inside = {
        str(p.relative_to(tmp_path / "c" / f"data-{A}"))
        for p in (tmp_path / "c").rglob("*.*")
        if p.is_file() and p.name != "manifest.json"
    }
    assert inside == {
        "owner.json",
        "rank00000-00.safetensors",
        "rank00000.digests",
        "extra/sub/config.json",
    }


def test_same_state_same_bytes(tmp_path: Path) -> None:
    state = {"a": torch.randn(100), "b": torch.randn(3, 3)}
    for name in ("1", "2"):
        save([FileSystemWriter(tmp_path / name)], whole(state, x={"k": [1, 2]}), A)
    one, two = ((tmp_path / d / f"data-{A}").iterdir() for d in "12")
    for a, b in zip(sorted(one), sorted(two), strict=True):
        assert (a.name, a.read_bytes()) == (b.name, b.read_bytes())


# Objects and extra files


def test_objects_inline_and_in_files(open_store: OpenStore) -> None:
    values = {"small": (0, {"lr": 0.1}), "large": (1, b"y" * 100_000), "edge": (1, b"e" * 4000)}
    plan = HandPlan(
        shapes={"t": (4,)}, shards=[Shard("t", (0,), torch.ones(4))], objects=values, world_size=2
    )
    save(writers(open_store, 2), plan, A)
    opened = reader(open_store)
    manifest, _ = opened.open_checkpoint(None)
    assert manifest.objects["small"].inline is not None
    assert manifest.objects["edge"].inline is not None
    assert manifest.objects["large"].inline is None
    for name in values:
        expected = plan.encoded(0) | plan.encoded(1)
        assert opened.read_object(manifest, manifest.objects[name]) == expected[name].data
        assert manifest.objects[name].pickled == expected[name].pickled
    opened.close_checkpoint()


def test_extra_files(open_store: OpenStore) -> None:
    extra = {"config.json": b'{"a": 1}', "deep/er/notes.txt": b"", "big.bin": b"q" * 200_000}
    save(writers(open_store), whole({"a": torch.ones(2)}), A, extra_files=extra)
    opened = reader(open_store)
    manifest, _ = opened.open_checkpoint(None)
    assert {n: opened.read_extra(manifest, n) for n in extra} == extra
    with pytest.raises(NotFoundError, match=r"config\.json"):
        opened.read_extra(manifest, "other")
    with pytest.raises(UsageError):
        opened.read_extra(manifest, "../manifest.json")
    opened.close_checkpoint()


@pytest.mark.parametrize("name", ["../x", "/abs", "a//b", "", "a\\b"])
def test_unsafe_extra_names_are_refused_before_anything_is_written(
    open_store: OpenStore, name: str
) -> None:
    with pytest.raises(UsageError):
        save(writers(open_store), whole({"a": torch.ones(2)}), A, extra_files={name: b""})
    assert list(open_store().list()) == []


# What moves


def test_contiguous_memory_is_written_from_where_it_lies(tmp_path: Path) -> None:
    store = RecordingByteStore(FileSystemStore(tmp_path))
    state = {"a": torch.randn(1000), "b": torch.randn(3_000_000), "c": torch.randn(10, 10)[2:5]}
    save([ShardedWriter(lambda _: store, "x")], whole(state), A)
    writes = [c for c in store.calls if c.operation == "write" and c.name.endswith("tensors")]
    addresses = {address for call in writes for address in call.addresses}
    for tensor in state.values():
        assert tensor.data_ptr() in addresses
    assert max(call.nbytes for call in writes) <= 64 << 20
    written = sum(call.nbytes for call in writes)
    assert written == 4096 + sum(t.nbytes for t in state.values())


def test_contiguous_memory_is_read_where_it_belongs(tmp_path: Path) -> None:
    state = {"a": torch.randn(1000), "b": torch.randn(3_000_000)}
    save([FileSystemWriter(tmp_path)], whole(state), A)
    store = RecordingByteStore(FileSystemStore(tmp_path))
    fresh = {name: torch.zeros_like(t) for name, t in state.items()}
    count = load(ShardedReader(lambda _: store, "x"), [(n, (0,), t) for n, t in fresh.items()])
    assert count == sum(t.nbytes for t in state.values())
    reads = [c for c in store.calls if c.operation == "read" and c.nbytes > 8]
    addresses = {address for call in reads for address in call.addresses}
    assert all(tensor.data_ptr() in addresses for tensor in fresh.values())


def test_a_row_range_reads_the_range_and_two_blocks(tmp_path: Path) -> None:
    full = torch.randn(1000, 1000)
    save([FileSystemWriter(tmp_path)], whole({"w": full}), A)
    destination = torch.zeros(50, 1000)
    count = load(FileSystemReader(tmp_path), [("w", (777, 0), destination)])
    assert torch.equal(destination, full[777:827])
    assert destination.nbytes <= count <= destination.nbytes + 2 * 65536
    exact = load(FileSystemReader(tmp_path, verify_digests=False), [("w", (777, 0), destination)])
    assert exact == destination.nbytes


def test_far_apart_columns_do_not_read_what_lies_between(tmp_path: Path) -> None:
    full = torch.randn(16, 200_000)
    save([FileSystemWriter(tmp_path)], whole({"w": full}), A)
    destination = torch.zeros(16, 10)
    count = load(FileSystemReader(tmp_path), [("w", (0, 100_000), destination)])
    assert torch.equal(destination, full[:, 100_000:100_010])
    assert count <= 16 * 2 * 65536


def test_many_small_tensors_take_few_calls(tmp_path: Path) -> None:
    store = RecordingByteStore(FileSystemStore(tmp_path))
    state = {f"layer.{i}": torch.full((8,), float(i)) for i in range(3000)}
    save([ShardedWriter(lambda _: store, "x")], whole(state), A)
    assert store.count("write") < 12
    assert store.count("sync") == 3  # data, digests, manifest
    store.clear()
    fresh = {name: torch.zeros(8) for name in state}
    load(ShardedReader(lambda _: store, "x"), [(n, (0,), t) for n, t in fresh.items()])
    assert all(torch.equal(fresh[name], state[name]) for name in state)
    assert store.count("read") < 12


def test_check_is_called_between_slices_and_stops_the_save(tmp_path: Path) -> None:
    calls = 0

    class Stop(Exception):
        pass

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stop

    writer = FileSystemWriter(tmp_path)
    plan = whole({"a": torch.zeros(20 << 20, dtype=torch.uint8)})
    writer.begin_save(None, ticket(A))
    with pytest.raises(Stop):
        writer.write_columns(
            plan.assignment(0),
            ["a"],
            [plan.shapes["a"]],
            [plan.shards[0].tensor],
            {},
            frozenset(),
            check,
        )
    writer.abort_save()
    assert list(tmp_path.iterdir()) == []


# Refusals


def test_an_assignment_for_another_state_is_refused(tmp_path: Path) -> None:
    plan = whole({"a": torch.ones(4)})
    other = whole({"a": torch.ones(4, dtype=torch.float64)})
    writer = FileSystemWriter(tmp_path)
    writer.begin_save(None, ticket(A))
    with pytest.raises(InvalidPlanError) as caught:
        writer.write_columns(
            plan.assignment(0), ["a"], [(4,)], [other.shards[0].tensor], {}, frozenset(), no_check
        )
    assert (caught.value.kind, caught.value.tensor) == ("results_mismatch", "a")
    writer.abort_save()


def test_a_destination_of_another_dtype_is_refused(tmp_path: Path) -> None:
    save([FileSystemWriter(tmp_path)], whole({"a": torch.ones(4)}), A)
    opened = FileSystemReader(tmp_path)
    manifest, _ = opened.open_checkpoint(None)
    columns = load_columns(manifest, [("a", (0,), torch.zeros(4))])
    with pytest.raises(StateMismatchError) as caught:
        opened.read_columns(manifest, columns, [torch.zeros(4, dtype=torch.int64)], no_check)
    assert (caught.value.kind, caught.value.tensor) == ("dtype_mismatch", "a")
    opened.close_checkpoint()


def test_a_manifest_of_another_open_is_refused(tmp_path: Path) -> None:
    save([FileSystemWriter(tmp_path)], whole({"a": torch.ones(4)}), A)
    opened = FileSystemReader(tmp_path)
    manifest, _ = opened.open_checkpoint(None)
    opened.open_checkpoint(None)
    with pytest.raises(UsageError):
        opened.read_columns(manifest, load_columns(manifest, []), [], no_check)
    opened.close_checkpoint()


def test_a_store_of_one_process_takes_one_rank() -> None:
    store = MemoryStore()
    writer = ShardedWriter(lambda _: store, "x")
    with pytest.raises(StorageError) as caught:
        writer.begin_save(None, ticket(A, world_size=2))
    assert caught.value.kind == "unsupported_storage"


def test_big_endian_machines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.byteorder", "big")
    with pytest.raises(StorageError) as caught:
        FileSystemWriter(tmp_path).begin_save(None, ticket(A))
    assert caught.value.kind == "unsupported_storage"
    with pytest.raises(StorageError):
        FileSystemReader(tmp_path).open_checkpoint(None)


def test_nothing_there(open_store: OpenStore) -> None:
    with pytest.raises(NotFoundError) as caught:
        reader(open_store).open_checkpoint(None)
    assert caught.value.kind == "not_found"
    assert caught.value.checkpoint == open_store().url


def test_uncommitted(open_store: OpenStore) -> None:
    (writer,) = writers(open_store)
    writer.begin_save(None, ticket(A))
    write(writer, whole({"a": torch.ones(2)}), 0)
    with pytest.raises(NotFoundError) as caught:
        reader(open_store).open_checkpoint(None)
    assert caught.value.kind == "not_committed"


def test_another_manifest_than_expected(open_store: OpenStore) -> None:
    first = save(writers(open_store), whole({"a": torch.ones(2)}), A)
    opened = reader(open_store)
    manifest, record = opened.open_checkpoint(None, first)
    assert (record, manifest.save_id) == (first, A)
    save(writers(open_store), whole({"a": torch.zeros(2)}), B)
    with pytest.raises(ConflictError) as caught:
        opened.open_checkpoint(None, first)
    assert caught.value.kind == "superseded"
    opened.close_checkpoint()


def test_manifest_source(open_store: OpenStore) -> None:
    (writer,) = writers(open_store)
    record = save([writer], whole({"a": torch.ones(2)}), A)
    source = writer.manifest_source(record)
    assert source().save_id == A
    save(writers(open_store), whole({"a": torch.zeros(2)}), B)
    with pytest.raises(ConflictError):
        source()


def test_a_writer_without_a_place(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        FileSystemWriter().observe(None)
    with pytest.raises(UsageError):
        FileSystemReader().open_checkpoint(None)
    writer = FileSystemWriter()
    assert writer.observe(tmp_path / "c") is None
    assert writer.checkpoint == str(tmp_path / "c")


@pytest.mark.parametrize("options", [{"thread_count": 0}, {"block_size": 1000}])
def test_impossible_options(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        FileSystemWriter(tmp_path, **options)  # type: ignore[arg-type]


def test_takes_columns_only_where_the_life_cycle_is_ours(tmp_path: Path) -> None:
    class Mine(FileSystemWriter):
        def write_data(self, plan, planner):  # type: ignore[no-untyped-def]
            return super().write_data(plan, planner)

    assert FileSystemWriter(tmp_path).takes_columns
    assert not Mine(tmp_path).takes_columns
    assert FileSystemReader(tmp_path).takes_columns


def test_errors_name_the_checkpoint(tmp_path: Path) -> None:
    store = FileSystemStore(tmp_path)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        ShardedReader(lambda _: store, "x").open_checkpoint(None)
    with pytest.raises(FileNotFoundError):
        store.read("x", [ReadRange(0, memoryview(bytearray(1)))])
