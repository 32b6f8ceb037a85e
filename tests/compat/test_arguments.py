"""Arguments and results of ``save``, ``load``, ``read_extra`` and ``Engine``, in one process."""

from __future__ import annotations

import copy
import enum
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dcp_engine as dcp
from tests.compat.storages import DictWriter

STATE = {"w": torch.arange(6.0).reshape(2, 3), "o": {"k": [1, "x"]}}


def target() -> dict[str, Any]:
    return {"w": torch.zeros(2, 3), "o": {"k": None}}


def check(found: dict[str, Any]) -> None:
    assert torch.equal(found["w"], STATE["w"])  # type: ignore[arg-type]
    assert found["o"] == STATE["o"]


@pytest.mark.parametrize("kind", [str, Path, lambda path: f"file://{path}"])
def test_a_checkpoint_id_alone_is_enough(tmp_path: Path, kind: Any) -> None:
    checkpoint_id = kind(tmp_path / "a" / "b")
    dcp.save(STATE, checkpoint_id=checkpoint_id)
    found = target()
    dcp.load(found, checkpoint_id=checkpoint_id)
    check(found)
    assert (tmp_path / "a" / "b" / "manifest.json").exists()


def test_the_id_goes_before_where_the_writer_points(tmp_path: Path) -> None:
    writer = dcp.FileSystemWriter(tmp_path / "one")
    dcp.save(STATE, storage_writer=writer)
    dcp.save(STATE, checkpoint_id=tmp_path / "two", storage_writer=writer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
    reader = dcp.FileSystemReader(tmp_path / "nowhere")
    found = target()
    dcp.load(found, checkpoint_id=tmp_path / "two", storage_reader=reader)
    check(found)


def test_without_a_place(tmp_path: Path) -> None:
    for call in (lambda: dcp.save(STATE), lambda: dcp.load(target())):
        with pytest.raises(dcp.UsageError, match="checkpoint_id"):
            call()
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.save(STATE, storage_writer=dcp.FileSystemWriter())
    assert caught.value.kind == "usage"


@pytest.mark.parametrize("timeout", [None, 60, 60.5, timedelta(minutes=1)])
def test_timeouts_of_every_kind(tmp_path: Path, timeout: Any) -> None:
    options: dict[str, Any] = {"timeout": timeout, "stall_timeout": timeout}
    dcp.save(STATE, checkpoint_id=tmp_path, phase_timeouts={"write": 30.0, "commit": 9}, **options)
    found = target()
    dcp.load(found, checkpoint_id=tmp_path, phase_timeouts={"read": 30.0}, **options)
    check(found)


class Slow:
    """Takes a deadline's time to say what it holds."""

    def state_dict(self) -> dict[str, Any]:
        import time

        time.sleep(0.05)
        return {"x": torch.ones(1)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise AssertionError("the load should have failed")


def test_deadlines_that_pass(tmp_path: Path) -> None:
    for options in (
        {"timeout": timedelta(milliseconds=10)},
        {"timeout": 0.01},
        {"timeout": None, "phase_timeouts": {"agree": 0.01}},
    ):
        with pytest.raises(dcp.CheckpointException) as caught:
            dcp.save({"s": Slow()}, checkpoint_id=tmp_path / "c", **options)  # type: ignore[arg-type]
        assert caught.value.kind == "timeout"
    assert not list(tmp_path.rglob("manifest.json"))
    dcp.save({"s": {"x": torch.ones(1)}}, checkpoint_id=tmp_path / "c")
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load({"s": Slow()}, checkpoint_id=tmp_path / "c", phase_timeouts={"plan": 0.01})
    assert caught.value.kind == "timeout"


def test_phases_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(dcp.UsageError, match="wriet"):
        dcp.save(STATE, checkpoint_id=tmp_path, phase_timeouts={"wriet": 1.0})
    with pytest.raises(dcp.UsageError, match="Its phases are latest, metadata, manifest"):
        dcp.load(target(), checkpoint_id=tmp_path, phase_timeouts={"write": 1.0})


def test_a_coordinator_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(dcp.UsageError, match="coordinator_rank"):
        dcp.save(STATE, checkpoint_id=tmp_path, coordinator_rank=1)
    with pytest.raises(dcp.UsageError, match="coordinator_rank"):
        dcp.load(target(), checkpoint_id=tmp_path, coordinator_rank=1)


def test_an_engine_is_a_context_manager(tmp_path: Path) -> None:
    with dcp.Engine(timeout=timedelta(minutes=1), stall_timeout=None) as engine:
        engine.save(STATE, checkpoint_id=tmp_path)
        found = target()
        engine.load(found, checkpoint_id=tmp_path)
        check(found)
    for call in (
        lambda: engine.save(STATE, checkpoint_id=tmp_path),
        lambda: engine.load(target(), checkpoint_id=tmp_path),
        lambda: engine.save(STATE, checkpoint_id=tmp_path, use_collectives=False),
    ):
        with pytest.raises(dcp.UsageError, match="closed"):
            call()
    engine.close()


def test_an_engines_own_deadline(tmp_path: Path) -> None:
    with dcp.Engine(timeout=0.01) as engine:
        with pytest.raises(dcp.CheckpointException):
            engine.save({"s": Slow()}, checkpoint_id=tmp_path)
        engine.save(STATE, checkpoint_id=tmp_path, timeout=60)


def test_extra_files_of_every_kind(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer.bin"
    source.write_bytes(bytes(range(256)))
    dcp.save(
        STATE,
        checkpoint_id=tmp_path / "c",
        extra_files={"config.json": '{"ä": 1}', "raw": b"\x00\x01", "deep/er/t.bin": source},
        user_metadata={"step": 5, "nested": {"loss": [0.5, None]}},
    )
    source.unlink()
    assert dcp.read_extra(tmp_path / "c", "config.json").decode() == '{"ä": 1}'
    assert dcp.read_extra(str(tmp_path / "c"), "raw") == b"\x00\x01"
    assert dcp.read_extra(tmp_path / "c", "deep/er/t.bin") == bytes(range(256))
    with pytest.raises(dcp.NotFoundError, match=r"config\.json"):
        dcp.read_extra(tmp_path / "c", "other")
    with pytest.raises(dcp.NotFoundError):
        dcp.read_extra(tmp_path / "nowhere", "raw")
    dcp.save(STATE, checkpoint_id=tmp_path / "c")
    with pytest.raises(dcp.NotFoundError):
        dcp.read_extra(tmp_path / "c", "raw")


@pytest.mark.parametrize(
    "name", ["../evil", "/abs", "", ".", "a/../b", "a//b", "a\\b", "nul\0", "a/", "\udc80"]
)
def test_extra_files_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.save(STATE, checkpoint_id=tmp_path / "c", extra_files={name: b"x"})
    assert caught.value.kind == "usage"
    assert sorted(p.name for p in tmp_path.rglob("*")) in ([], ["c"])


def test_an_extra_file_that_is_not_there_fails_the_save(tmp_path: Path) -> None:
    dcp.save(STATE, checkpoint_id=tmp_path / "c")
    before = sorted(p.name for p in (tmp_path / "c").iterdir())
    with pytest.raises(dcp.CheckpointException, match="missing-file"):
        dcp.save({}, checkpoint_id=tmp_path / "c", extra_files={"x": tmp_path / "missing-file"})
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == before
    with pytest.raises(dcp.CheckpointException, match="user_metadata"):
        dcp.save({}, checkpoint_id=tmp_path / "c", user_metadata={"x": object()})
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == before


def test_metadata_is_lazy_and_pickles_as_plain_classes(tmp_path: Path) -> None:
    metadata = dcp.save(STATE, checkpoint_id=tmp_path)
    entry = metadata.state_dict_metadata["w"]
    assert isinstance(entry, dcp.TensorStorageMetadata)
    assert (entry.size, entry.properties.dtype) == (torch.Size([2, 3]), torch.float32)
    assert set(metadata.state_dict_metadata) == {"w", "o.k"}
    assert metadata.planner_data["o.k"] == ("o", "k")
    with pytest.raises(TypeError):
        metadata.state_dict_metadata["w"] = entry  # type: ignore[index]
    with pytest.raises(KeyError):
        metadata.state_dict_metadata["other"]
    for plain in (pickle.loads(pickle.dumps(metadata)), copy.deepcopy(metadata)):
        assert type(plain) is dcp.Metadata
        assert type(plain.state_dict_metadata) is dict
        assert plain.state_dict_metadata["w"] == entry
        assert plain.planner_data == {"w": ("w",), "o.k": ("o", "k")}
    assert b"dcp_engine.format" not in pickle.dumps(metadata)


def test_metadata_of_a_replaced_checkpoint_says_so(tmp_path: Path) -> None:
    looked, late = (dcp.save(STATE, checkpoint_id=tmp_path / n) for n in ("one", "two"))
    assert len(looked.state_dict_metadata) == 2
    for name in ("one", "two"):
        dcp.save({"other": 1}, checkpoint_id=tmp_path / name)
    assert len(looked.state_dict_metadata) == 2
    with pytest.raises(dcp.ConflictError):
        len(late.state_dict_metadata)


def test_load_reports(tmp_path: Path) -> None:
    dcp.save(STATE, checkpoint_id=tmp_path)
    report = dcp.load({"w": torch.zeros(2, 3)}, checkpoint_id=tmp_path)
    assert report == dcp.LoadReport(
        save_id=next(p.name for p in tmp_path.glob("data-*"))[5:],
        unexpected=("o.k",),
        bytes_read=report.bytes_read,
    )
    assert report.bytes_read is not None
    assert report.bytes_read >= 24


def test_a_failing_stateful_is_named(tmp_path: Path) -> None:
    class Picky(Slow):
        def state_dict(self) -> dict[str, Any]:
            return {"x": torch.zeros(1)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            raise ValueError("not my state")

    dcp.save({"s": {"x": torch.ones(1)}}, checkpoint_id=tmp_path)
    for planner in (None, _Custom()):
        with pytest.raises(dcp.CheckpointException, match="not my state") as caught:
            dcp.load({"s": Picky()}, checkpoint_id=tmp_path, planner=planner)
        assert isinstance(caught.value.failures[0][0], ValueError)
        assert caught.value.hint is not None
        assert "partly filled" in caught.value.hint


class _Custom(dcp.DefaultLoadPlanner):
    def finish_plan(self, central_plan: dcp.LoadPlan) -> dcp.LoadPlan:
        return central_plan


def test_keyboard_interrupts_stay_what_they_are(tmp_path: Path) -> None:
    class Interrupted(Slow):
        def state_dict(self) -> dict[str, Any]:
            raise KeyboardInterrupt

    dcp.save(STATE, checkpoint_id=tmp_path)
    for call in (dcp.save, dcp.load):
        with pytest.raises(KeyboardInterrupt):
            call({"s": Interrupted()}, checkpoint_id=tmp_path)  # type: ignore[operator]


def test_closed_default_engines_are_replaced() -> None:
    engine = dcp.default_engine()
    assert dcp.default_engine() is engine
    engine.close()
    assert dcp.default_engine() is not engine


@pytest.fixture
def fake_group(request: pytest.FixtureRequest) -> Any:
    """A job of four ranks of which this process plays one, without a network."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=1, world_size=4)
    yield
    dist.destroy_process_group()


def test_a_group_that_nobody_can_talk_over(fake_group: Any, tmp_path: Path) -> None:
    with pytest.raises(dcp.UsageError, match="no_dist"):
        dcp.save(STATE, checkpoint_id=tmp_path)
    with pytest.raises(dcp.UsageError, match="no_dist"):
        dcp.load(target(), checkpoint_id=tmp_path)
    assert list(tmp_path.iterdir()) == []
    dcp.save(STATE, checkpoint_id=tmp_path, no_dist=True)
    found = target()
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    check(found)


def test_collective_free_saves_need_no_word(fake_group: Any, tmp_path: Path) -> None:
    with pytest.raises(dcp.UsageError, match="save_id"):
        dcp.save(STATE, checkpoint_id=tmp_path, use_collectives=False)
    token = "0123456789abcdef" * 2
    dcp.save(STATE, checkpoint_id=tmp_path, use_collectives=False, save_id=token)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"data-{token}",
        "manifest-rank00001.json",
    ]
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(target(), checkpoint_id=tmp_path, no_dist=True)
    assert caught.value.kind == "incomplete"
    assert "ranks 0, 2, 3 of 4" in str(caught.value)


def test_collective_free_on_one_rank(tmp_path: Path) -> None:
    dcp.save(STATE, checkpoint_id=tmp_path / "c", use_collectives=False, extra_files={"a": "b"})
    found = target()
    dcp.load(found, checkpoint_id=tmp_path / "c")
    check(found)
    assert dcp.read_extra(tmp_path / "c", "a") == b"b"
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.save(STATE, checkpoint_id=tmp_path / "c", use_collectives=False)
    assert caught.value.kind == "conflict"
    with pytest.raises(dcp.UsageError, match="32 hexadecimal"):
        dcp.save(STATE, checkpoint_id=tmp_path, use_collectives=False, save_id="short")


def test_a_save_id_is_for_collective_free_saves(tmp_path: Path) -> None:
    with pytest.raises(dcp.UsageError, match="use_collectives"):
        dcp.save(STATE, checkpoint_id=tmp_path, save_id="0" * 32)


def test_writers_of_other_origin_take_plain_path_objects() -> None:
    checkpoints: dict[str, Any] = {}
    dcp.save(STATE, checkpoint_id=Path("a/b"), storage_writer=DictWriter(checkpoints))
    assert list(checkpoints) == ["a/b"]


class TheirType(enum.Enum):
    """As torch's ``AsyncCheckpointerType``: equal values, another class."""

    THREAD = "thread"


@pytest.mark.parametrize("given", [TheirType.THREAD, "thread"])
def test_where_an_asynchronous_save_runs_may_be_said_in_torchs_words(
    tmp_path: Path, given: Any
) -> None:
    saved = dcp.async_save(
        STATE, checkpoint_id=tmp_path / "c", async_checkpointer_type=given, no_dist=True
    )
    saved.result(60)
    found = target()
    dcp.load(found, checkpoint_id=tmp_path / "c")
    check(found)


def test_an_unknown_place_for_an_asynchronous_save(tmp_path: Path) -> None:
    unknown: Any = "fibre"
    with dcp.Engine() as engine:
        for call in (
            lambda: engine.async_save(
                STATE, checkpoint_id=tmp_path, async_checkpointer_type=unknown
            ),
            lambda: engine.warmup(STATE, async_checkpointer_type=unknown),
        ):
            with pytest.raises(dcp.UsageError, match="'fibre'") as caught:
                call()
            assert "THREAD" in str(caught.value)
