"""Every kind of value through every way of a save: columns, items, storage of other origin."""

from __future__ import annotations

import importlib
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from tests.compat import planners, storages
from tests.wrapper_tensors import Scaled

WAYS = ["columns", "items", "foreign"]
Way = Callable[[dict[str, Any], dict[str, Any]], dcp.Metadata]


class Plain(dcp.DefaultSavePlanner):
    """The default planner, but a class of its own: goes by items."""

    def finish_plan(self, new_plan: dcp.SavePlan) -> dcp.SavePlan:
        return super().finish_plan(new_plan)


@pytest.fixture(params=WAYS)
def round_trip(request: pytest.FixtureRequest, tmp_path: Path) -> Way:
    """Saves the first state dict and loads it into the second."""
    writers = {"foreign": storages.FileWriter}
    readers = {"foreign": storages.FileReader}
    path = tmp_path / "c"

    def run(source: dict[str, Any], target: dict[str, Any]) -> dcp.Metadata:
        items = request.param == "items"
        metadata = dcp.save(
            source,
            storage_writer=writers.get(request.param, dcp.FileSystemWriter)(path),
            planner=Plain() if items else None,
            no_dist=True,
        )
        dcp.load(
            target,
            storage_reader=readers.get(request.param, dcp.FileSystemReader)(path),
            planner=planners.ExtraDataLoadPlanner() if items else None,
            no_dist=True,
        )
        return metadata

    return run


def _dtypes() -> list[torch.dtype]:
    found = {v for v in vars(torch).values() if isinstance(v, torch.dtype)}
    usable = []
    for dtype in sorted(found, key=str):
        try:
            torch.zeros(3, dtype=dtype).clone()
        except (RuntimeError, NotImplementedError, TypeError):
            continue
        if dtype.is_floating_point or dtype.is_complex or "q" not in str(dtype).split(".")[1]:
            usable.append(dtype)
    return usable


def same_bytes(one: torch.Tensor, two: torch.Tensor) -> bool:
    assert (one.dtype, one.shape) == (two.dtype, two.shape)
    one, two = one.contiguous(), two.contiguous()
    return one.untyped_storage().tolist() == two.untyped_storage().tolist()


def pattern(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bytes but those that are no value of the dtype (bool)."""
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.arange(1, size + 1, dtype=torch.int64) * 37 % 251
    raw = raw % 2 if dtype is torch.bool else raw
    return raw.to(torch.uint8).view(dtype).reshape(shape)


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
def test_every_dtype(round_trip: Way) -> None:
    dtypes = _dtypes()
    assert len(dtypes) > 20
    source = {str(d): pattern(d, 5) for d in dtypes} | {f"{d}-0": pattern(d) for d in dtypes}
    target = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    round_trip(dict(source), dict(target))
    for name, tensor in source.items():
        assert same_bytes(target[name], tensor), name


def test_shapes_strides_views_and_ties(round_trip: Way) -> None:
    base = torch.arange(60.0).reshape(3, 4, 5)
    tied = torch.arange(6)
    source = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.transpose(0, 2),
        "stepped": base[:, ::2, 1:],
        "expanded": torch.arange(3).expand(4, 3),
        "last": base[2],
        "tied": tied,
        "tied_too": tied,
        "tied_view": tied.view(2, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "channels_last": torch.ones(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
    }
    memory = torch.zeros(8, 9)
    target = {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in source.items()
    }
    target["last"] = memory[1:5, 2:7]
    target["stepped"] = torch.zeros(3, 2, 4).transpose(0, 2).contiguous().transpose(0, 2)
    held = dict(target)
    round_trip(source, target)
    for name, tensor in source.items():
        assert target[name] is held[name], name
        assert torch.equal(target[name], tensor.detach()), name
    assert torch.equal(memory[1:5, 2:7], base[2])
    assert memory.sum() == base[2].sum()


def test_a_small_view_costs_its_own_bytes(tmp_path: Path) -> None:
    big = torch.zeros(1 << 20)
    dcp.save(
        {"view": big[100:110], "tied": big[:1024], "tied_too": big[:1024]},
        storage_writer=dcp.FileSystemWriter(tmp_path),
        no_dist=True,
    )
    total = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert total < 8 + 4096 + 4 * 1024 + 4 * 10 + 4096


Point = namedtuple("Point", "x y")


def test_containers(round_trip: Way) -> None:
    def state(filled: bool) -> dict[str, Any]:
        one = 1.0 if filled else 0.0
        return {
            "a": {"b": {0: torch.full((2,), one), "c": [1, 2] if filled else []}},
            "list": [
                torch.full((1,), one),
                {"deep": (torch.full((3,), one), "x" if filled else "")},
            ],
            "point": Point(torch.full((2,), one), 5 if filled else 0),
            "ordered": OrderedDict(k=torch.full((1,), one), v=None if filled else 0),
            "nothing": {} if filled else None,
            "plain": [1, (2, [3])] if filled else None,
        }

    target = state(False)
    inner = target["list"]
    round_trip(state(True), target)
    wanted = state(True)
    assert torch.equal(target["a"]["b"][0], wanted["a"]["b"][0])
    assert target["a"]["b"]["c"] == [1, 2]
    assert target["list"] is inner
    assert torch.equal(target["list"][1]["deep"][0], torch.ones(3))
    assert target["list"][1]["deep"][1] == "x"
    assert isinstance(target["point"], Point)
    assert (target["point"].x.tolist(), target["point"].y) == ([1, 1], 5)
    assert isinstance(target["ordered"], OrderedDict)
    assert target["ordered"]["v"] is None
    assert target["nothing"] == {}
    assert target["plain"] == [1, (2, [3])]


OBJECTS: list[Any] = [
    None, True, 5, 1 << 80, 0.1, float("-inf"), "text", b"bytes", (1, (2,)), {1, 2}, 2 + 3j,
    torch.Size([2, 3]), torch.bfloat16, torch.device("cpu"), Path("/a/b"), [], {}, [1, [None]],
    "x" * 9000,
]  # fmt: skip


def test_objects(round_trip: Way) -> None:
    source = {f"o{i}": value for i, value in enumerate(OBJECTS)}
    target = dict.fromkeys(source, "before")
    round_trip(source, target)
    for key, value in source.items():
        expected = value
        assert target[key] == expected, key
        assert type(target[key]) is type(expected) or isinstance(value, Path), key


class Scheduler:
    """A custom Stateful."""

    def __init__(self) -> None:
        self.step = 0
        self.loads = 0
        self.average = torch.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loads += 1
        self.step = state_dict["step"]
        assert state_dict["average"] is self.average


def training(seed: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (seed + 1))
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    scheduler = Scheduler()
    scheduler.step = seed
    scheduler.average += seed
    return {"app": {"model": model, "parts": [optimizer, (scheduler, "tag")]}, "seed": seed}


def test_stateful_values_at_any_depth(round_trip: Way) -> None:
    source, target = training(1, 2), training(2, 2)
    model, scheduler = target["app"]["model"], target["app"]["parts"][1][0]
    round_trip(source, target)
    assert target["app"]["model"] is model
    assert target["app"]["parts"][1][0] is scheduler
    for one, two in zip(source["app"]["model"].parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two)
    ours, theirs = target["app"]["parts"][0].state_dict(), source["app"]["parts"][0].state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for i, entry in theirs["state"].items():
        assert torch.equal(ours["state"][i]["exp_avg"], entry["exp_avg"])
        assert torch.equal(ours["state"][i]["step"], entry["step"])
    assert (scheduler.step, scheduler.loads, scheduler.average.tolist()) == (1, 1, [1, 1, 1])
    assert target["seed"] == 1


def scaled(value: int, bits: int = 8) -> Scaled:
    return Scaled(torch.full((4, 2), value, dtype=torch.int8), torch.full((4,), value / 2), bits)


def test_wrapper_subclasses(round_trip: Way) -> None:
    target = {"layer": {"w": scaled(0)}}
    held = target["layer"]["w"]
    metadata = round_trip({"layer": {"w": scaled(6)}}, target)
    assert target["layer"]["w"] is held
    assert torch.equal(held.data_, torch.full((4, 2), 6, dtype=torch.int8))
    assert torch.equal(held.scale, torch.full((4,), 3.0))
    assert {"layer.w.data_", "layer.w.scale"} < set(metadata.state_dict_metadata)


def test_a_wrapper_of_another_context_is_refused_before_anything_moves(round_trip: Way) -> None:
    target = {"w": scaled(0, bits=4), "x": torch.zeros(2)}
    with pytest.raises(dcp.CheckpointException) as caught:
        round_trip({"w": scaled(6), "x": torch.ones(2)}, target)
    assert caught.value.kind == "type_mismatch"
    assert caught.value.tensor == "w"


torch_metadata: Any = importlib.import_module("torch.distributed.checkpoint.metadata")
torch_planner: Any = importlib.import_module("torch.distributed.checkpoint.planner")


class Columns:
    """Describes itself through torch's ``_Checkpointable`` methods, in torch's own classes: a
    (rows, 6) tensor kept as ``parts`` blocks of columns."""

    def __init__(self, whole: torch.Tensor, parts: int) -> None:
        self.size_ = whole.shape
        self.dtype = whole.dtype
        step = whole.shape[1] // parts
        self.parts = {
            (0, at): whole[:, at : at + step].clone() for at in range(0, whole.shape[1], step)
        }

    def _chunk(self, at: tuple[int, ...]) -> Any:
        return torch_metadata.ChunkStorageMetadata(torch.Size(at), self.parts[at].shape)

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        return [
            torch_planner.WriteItem(
                index=torch_metadata.MetadataIndex(fqn, at),
                type=torch_planner.WriteItemType.SHARD,
                tensor_data=torch_planner.TensorWriteData(
                    chunk=self._chunk(at),
                    properties=torch_metadata.TensorProperties(dtype=self.dtype),
                    size=self.size_,
                ),
            )
            for at in self.parts
        ]

    def __create_chunk_list__(self) -> list[Any]:
        return [self._chunk(at) for at in self.parts]

    def __get_tensor_shard__(self, index: Any) -> torch.Tensor:
        return self.parts[tuple(index.offset)]

    def whole(self) -> torch.Tensor:
        return torch.cat([self.parts[at] for at in sorted(self.parts)], dim=1)


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_values_that_describe_themselves_in_torchs_classes(round_trip: Way, parts: int) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    target = {"c": Columns(torch.zeros(4, 6), parts)}
    round_trip({"c": Columns(whole, 3)}, target)
    assert torch.equal(target["c"].whole(), whole)


REFUSED: dict[str, Callable[[], Any]] = {
    "meta": lambda: torch.empty(2, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "lazy": lambda: torch.nn.LazyLinear(2).weight,
    "lock": lambda: __import__("threading").Lock(),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_what_could_not_be_loaded_again_is_refused_at_save(round_trip: Way, name: str) -> None:
    with pytest.raises(dcp.CheckpointException) as caught:
        round_trip({"fine": torch.ones(1), "deep": {"bad": REFUSED[name]()}}, {})
    assert caught.value.kind == "unsupported_state"
    assert caught.value.tensor == "deep.bad"
    assert caught.value.rank == 0
    assert list(caught.value.failures) == [0]
    with pytest.raises(dcp.CheckpointException):
        round_trip({"deep": {("tuple", "key"): torch.ones(1)}}, {})
