"""One row of the planning table, measured on torch's DCP in a process of its own.

The items are those that DCP's planner makes of DTensors, plain tensors and objects; everything
else is DCP's own code, in the order in which its ``save`` and ``load`` call it: gather of plans,
global plan, scatter of plans, gather of results, metadata. Only ranks' work that does not count
(making items and pickles) is done outside the timing. Belongs here: that simulation.

``python -m benchmarks.planning_dcp '{"layout": "rows", "world_size": 64, ...}'`` prints JSON.
"""

from __future__ import annotations

import gc
import json
import pickle
import statistics
import sys
import time
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import (  # noqa: TID251
    DefaultSavePlanner,
)
from torch.distributed.checkpoint.filesystem import (  # noqa: TID251
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import (  # noqa: TID251
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (  # noqa: TID251
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import (  # noqa: TID251
    create_read_items_for_chunk_list,
)
from torch.distributed.checkpoint.storage import WriteResult  # noqa: TID251

from benchmarks.measuring import current_rss, peak_rss
from benchmarks.planning_layouts import LAYOUTS, Layout, Part, object_names, replicated, sharded


def item_of(part: Part, kind: WriteItemType) -> WriteItem:
    """As ``planner_helpers`` makes it of a DTensor or a plain tensor."""
    offsets, sizes = torch.Size(part.offsets), torch.Size(part.sizes)
    return WriteItem(
        index=MetadataIndex(part.fqn, offsets),
        type=kind,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=part.dtype),
            size=torch.Size(part.shape),
        ),
    )


def local_plan(layout: Layout, world_size: int, rank: int, tensors: int) -> SavePlan:
    """One rank's plan."""
    items = [
        item_of(part, WriteItemType.SHARD) for part in sharded(layout, world_size, rank, tensors)
    ]
    items += [item_of(part, WriteItemType.TENSOR) for part in replicated()]
    items += [
        WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO) for name in object_names()
    ]
    mappings = {item.index.fqn: tuple(item.index.fqn.split(".")) for item in items}
    return SavePlan(items, planner_data=mappings)


def results_of(plan: SavePlan, rank: int) -> list[WriteResult]:
    """What a rank reports of its items."""
    position, results = 0, []
    for item in plan.items:
        length = 4096
        if item.tensor_data is not None and item.tensor_data.chunk is not None:
            length = item.tensor_data.chunk.sizes.numel() * 4 + 1300
        results.append(
            WriteResult(
                index=item.index,
                size_in_bytes=length,
                storage_data=_StorageInfo(f"__{rank}_0.distcp", position, length),
            )
        )
        position += length
    return results


def measure(layout_name: str, world_size: int, tensors: int, rounds: int) -> dict[str, Any]:
    """All columns of one row."""
    layout = LAYOUTS[layout_name]
    before = current_rss()
    plans, local = [], []
    for rank in range(world_size):
        began = time.process_time()
        plan = local_plan(layout, world_size, rank, tensors)
        plans.append(pickle.dumps(plan))
        local.append(time.process_time() - began)
        del plan
    runs = []
    for number in range(rounds):
        runs.append(_save(plans, world_size))
        if number == 0:
            runs[0]["peak_bytes"] = peak_rss() - before
    data = runs[0].pop("metadata")
    result = dict(runs[0])
    for name in ("plan", "finish"):
        result[name] = statistics.median(run[name] for run in runs)
    result["load"] = _load(layout, world_size, tensors, data, rounds)
    return {
        "engine": "torch DCP",
        "layout": layout_name,
        "world_size": world_size,
        "tensors": tensors,
        "local_seconds": {"items and pickle": statistics.median(local)},
        **result,
    }


def _save(plans: list[bytes], world_size: int) -> dict[str, Any]:
    planner = DefaultSavePlanner()
    writer = FileSystemWriter("/checkpoints/step-000100")
    gc.collect()
    began = time.process_time()
    received = [pickle.loads(data) for data in plans]
    planned, metadata = planner.create_global_plan(received)
    planned = writer.prepare_global_plan(planned)
    answers = [pickle.dumps(plan) for plan in planned]
    plan_seconds = time.process_time() - began
    del received
    results = [
        pickle.dumps(results_of(pickle.loads(answer), rank)) for rank, answer in enumerate(answers)
    ]
    gc.collect()
    began = time.process_time()
    gathered = [pickle.loads(data) for data in results]
    # What FileSystemWriter.finish does before it writes, and the broadcast that follows it.
    storage_data: dict[MetadataIndex, Any] = {}
    for of_rank in gathered:
        storage_data.update({result.index: result.storage_data for result in of_rank})
    metadata.storage_data = storage_data
    data = pickle.dumps(metadata)
    sent = pickle.dumps(metadata)
    finish_seconds = time.process_time() - began
    chunks = sum(
        len(entry.chunks)
        for entry in metadata.state_dict_metadata.values()
        if isinstance(entry, TensorStorageMetadata)
    )
    return {
        "plan": plan_seconds,
        "finish": finish_seconds,
        "bytes": {
            "plan_out": statistics.mean(map(len, plans)),
            "results_out": statistics.mean(map(len, results)),
            "plan_in": statistics.mean(map(len, answers)),
            "metadata_in": len(sent),
        },
        "manifest_bytes": len(data),
        "chunks": chunks,
        "metadata": data,
    }


def _load(
    layout: Layout, world_size: int, tensors: int, data: bytes, rounds: int
) -> dict[str, float]:
    """Open the metadata and plan one rank's load."""
    rank = world_size // 2
    wanted = [*sharded(layout, world_size, rank, tensors), *replicated()]
    opened, planned = [], []
    for _ in range(rounds):
        gc.collect()
        began = time.process_time()
        metadata = pickle.loads(data)
        opened.append(time.process_time() - began)
        items = []
        for part in wanted:
            chunk = ChunkStorageMetadata(
                offsets=torch.Size(part.offsets), sizes=torch.Size(part.sizes)
            )
            entry = metadata.state_dict_metadata[part.fqn]
            items += create_read_items_for_chunk_list(part.fqn, entry, [chunk])
        planned.append(time.process_time() - began)
        del metadata, items
    return {"open": statistics.median(opened), "same": statistics.median(planned)}


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(
        json.dumps(
            measure(request["layout"], request["world_size"], request["tensors"], request["rounds"])
        )
    )
