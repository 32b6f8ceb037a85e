"""The vocabulary: where torch's DCP has a name that we promise, we have it, and calls fit."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import traceback
from typing import Any

import pytest

import dcp_engine as dcp

# Compared with, here only: the engine itself imports none of it.
torch_dcp: Any = importlib.import_module("torch.distributed.checkpoint")

PROMISED = {
    "metadata": [
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
        "STATE_DICT_TYPE", "STORAGE_TYPES", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata",
    ],
    "planner": [
        "BytesIOWriteData", "LoadItemType", "LoadPlan", "LoadPlanner", "ReadItem", "SavePlan",
        "SavePlanner", "TensorWriteData", "WriteItem", "WriteItemType",
    ],
    "default_planner": [
        "DefaultLoadPlanner", "DefaultSavePlanner", "create_default_global_load_plan",
        "create_default_global_save_plan", "create_default_local_load_plan",
        "create_default_local_save_plan", "flatten_state_dict", "_flatten_sharded_tensors",
    ],
    "storage": ["StorageReader", "StorageWriter", "WriteResult"],
    "stateful": ["Stateful", "StatefulT"],
    "api": ["CheckpointException"],
    "filesystem": ["FileSystemReader", "FileSystemWriter"],
    "staging": ["AsyncStager", "BlockingAsyncStager", "DefaultStager", "StagingOptions"],
    "state_dict_saver": ["AsyncCheckpointerType", "AsyncSaveResponse", "async_save", "save"],
    "state_dict_loader": ["load"],
    "planner_helpers": ["create_read_items_for_chunk_list"],
}  # fmt: skip

AT_THE_TOP = [
    "BytesIOWriteData", "BytesStorageMetadata", "CheckpointException", "ChunkStorageMetadata",
    "DefaultLoadPlanner", "DefaultSavePlanner", "FileSystemReader", "FileSystemWriter",
    "LoadItemType", "LoadPlan", "LoadPlanner", "Metadata", "MetadataIndex", "ReadItem", "SavePlan",
    "SavePlanner", "Stateful", "StorageMeta", "StorageReader", "StorageWriter",
    "TensorProperties", "TensorStorageMetadata", "TensorWriteData", "WriteItem", "WriteItemType",
    "WriteResult", "create_default_global_load_plan", "create_default_global_save_plan",
    "create_default_local_load_plan", "create_default_local_save_plan", "load", "save",
    "Engine", "default_engine", "read_extra", "prune", "PerRank",
    "AsyncCheckpointerType", "AsyncSaveResponse", "AsyncStager", "BlockingAsyncStager",
    "DefaultStager", "StagingOptions", "async_save",
]  # fmt: skip

PAIRS = [(module, name) for module, names in PROMISED.items() for name in names]

# Not in torch 2.6.
LATER = {
    "AsyncCheckpointerType", "AsyncSaveResponse", "BytesIOWriteData", "DefaultStager",
    "StagingOptions",
}  # fmt: skip

# Not in torch 2.6; where it came, WriteItem got a field for it, ahead of tensor_data.
BYTES_HAVE_DATA = hasattr(torch_dcp.planner, "BytesIOWriteData")


@pytest.mark.parametrize(("module", "name"), PAIRS)
def test_modules_have_dcps_names(module: str, name: str) -> None:
    if name not in LATER or BYTES_HAVE_DATA:
        assert hasattr(importlib.import_module(f"torch.distributed.checkpoint.{module}"), name)
    ours = getattr(importlib.import_module(f"dcp_engine.{module}"), name)
    if name in AT_THE_TOP:
        assert getattr(dcp, name) is ours


@pytest.mark.parametrize("name", AT_THE_TOP)
def test_names_at_the_top(name: str) -> None:
    assert name in dcp.__all__
    assert getattr(dcp, name) is not None


def _parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _check_callable_alike(theirs: Any, ours: Any) -> None:
    """Every call that ``theirs`` takes, ``ours`` takes too."""
    wanted, offered = _parameters(theirs), _parameters(ours)
    names = [p.name for p in offered]
    positional = [p.name for p in offered if p.kind is not p.KEYWORD_ONLY]
    for position, parameter in enumerate(wanted):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            assert any(p.kind is parameter.kind for p in offered), parameter
            continue
        assert parameter.name in names, f"{parameter.name} is missing"
        mine = offered[names.index(parameter.name)]
        if parameter.kind is not parameter.KEYWORD_ONLY:
            assert positional[position] == parameter.name, f"{parameter.name} has another place"
        if parameter.default is not parameter.empty:
            assert mine.default == parameter.default, f"{parameter.name}={mine.default!r}"
    for parameter in offered:
        if parameter.name not in {p.name for p in wanted}:
            optional = parameter.default is not parameter.empty
            assert optional or parameter.kind in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            ), f"{parameter.name} is new and required"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *((m, n) for m, n in PAIRS if n.startswith("create_default")),
        ("state_dict_saver", "save"),
        ("state_dict_saver", "async_save"),
        ("state_dict_loader", "load"),
        ("planner_helpers", "create_read_items_for_chunk_list"),
        ("default_planner", "DefaultSavePlanner"),
        ("default_planner", "DefaultLoadPlanner"),
        ("metadata", "TensorProperties"),
        ("metadata", "Metadata"),
        ("metadata", "MetadataIndex"),
        ("metadata", "StorageMeta"),
        ("planner", "WriteItem"),
        ("planner", "ReadItem"),
        ("planner", "SavePlan"),
        ("planner", "LoadPlan"),
        ("planner", "TensorWriteData"),
        ("storage", "WriteResult"),
        ("api", "CheckpointException"),
    ],
)
def test_functions_and_constructors_take_dcps_arguments(module: str, name: str) -> None:
    if name == "WriteItem" and not BYTES_HAVE_DATA:
        pytest.skip("this torch's WriteItem lacks a field that ours has, as later versions do")
    theirs = getattr(importlib.import_module(f"torch.distributed.checkpoint.{module}"), name)
    theirs = inspect.unwrap(theirs)
    ours = getattr(importlib.import_module(f"dcp_engine.{module}"), name)
    if name == "load":  # returned annotation aside, the arguments are the same
        assert _parameters(theirs)[0].name == "state_dict"
    if name == "CheckpointException":  # failures may be left out here
        assert [p.name for p in _parameters(ours)][:2] == ["msg", "failures"]
        return
    if name in ("save", "async_save"):
        assert {p.name for p in _parameters(theirs)} <= {p.name for p in _parameters(ours)}
        return
    _check_callable_alike(theirs, ours)


METHODS = {
    "SavePlanner": [
        "set_up_planner", "create_local_plan", "create_global_plan", "finish_plan", "resolve_data",
    ],
    "LoadPlanner": [
        "set_up_planner", "create_local_plan", "create_global_plan", "finish_plan", "load_bytes",
        "resolve_bytes", "resolve_tensor", "commit_tensor",
    ],
    "DefaultSavePlanner": ["lookup_object", "transform_object"],
    "DefaultLoadPlanner": ["lookup_tensor", "transform_tensor"],
    "AsyncStager": ["stage", "synchronize_staging"],
    "StorageWriter": [
        "reset", "set_up_storage_writer", "prepare_local_plan", "prepare_global_plan",
        "write_data", "finish", "validate_checkpoint_id", "storage_meta",
    ],
    "StorageReader": [
        "reset", "read_metadata", "set_up_storage_reader", "prepare_local_plan",
        "prepare_global_plan", "read_data", "validate_checkpoint_id",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("cls", "method"), [(c, m) for c, ms in METHODS.items() for m in ms])
def test_methods_take_dcps_arguments(cls: str, method: str) -> None:
    modules = [f"torch.distributed.checkpoint.{m}" for m in PROMISED]
    theirs = next(
        getattr(importlib.import_module(m), cls)
        for m in modules
        if hasattr(importlib.import_module(m), cls)
    )
    _check_callable_alike(getattr(theirs, method), getattr(getattr(dcp, cls), method))


@pytest.mark.parametrize("cls", ["WriteItemType", "LoadItemType"])
def test_enumerations_have_the_same_members(cls: str) -> None:
    planner = importlib.import_module("torch.distributed.checkpoint.planner")
    theirs = getattr(planner, cls)
    assert {m.name: m.value for m in theirs} == {m.name: m.value for m in getattr(dcp, cls)}


def test_checkpoint_exception_is_an_exception_with_failures_like_torchs() -> None:
    try:
        raise ValueError("inner")
    except ValueError as error:
        stack = traceback.extract_tb(error.__traceback__)
        failures = {3: (error, stack)}
    raised = dcp.CheckpointException("it failed", failures)
    assert isinstance(raised, Exception)
    assert raised.failures == failures
    exception, summary = raised.failures[3]
    assert isinstance(exception, ValueError)
    assert isinstance(summary, traceback.StackSummary)
    theirs = torch_dcp.CheckpointException("it failed", failures)
    assert theirs.failures == raised.failures
    assert "rank 3" in str(raised)
    assert "inner" in str(raised)
    assert dcp.CheckpointException("alone").failures == {}


IMPORTS = """
import sys
import dcp_engine
for name in MODULES:
    assert getattr(dcp_engine, name).__name__ == "dcp_engine." + name
modules = [m for m in sys.modules if m.split(".")[0] == "storage_backends"]
assert not modules, modules
assert "torch.distributed.checkpoint" not in sys.modules
assert dcp_engine.filesystem.FileSystemWriter is dcp_engine.FileSystemWriter
assert "storage_backends.filesystem" in sys.modules
assert "torch.distributed.checkpoint" not in sys.modules
assert "FileSystemReader" in dir(dcp_engine.filesystem)
for module in (dcp_engine, dcp_engine.filesystem):
    try:
        module.nothing_of_this_name
    except AttributeError as error:
        assert "nothing_of_this_name" in str(error)
    else:
        raise SystemExit("no AttributeError")
"""


def test_backends_come_late_and_torchs_dcp_never() -> None:
    script = f"MODULES = {list(PROMISED)}\n{IMPORTS}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
