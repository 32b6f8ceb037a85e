"""One row of the planning table, measured on dcp_engine in a process of its own.

The coordinator runs the engine's own code (``saver.agreement``, the commit's checks and manifest)
over an ``Operation`` that hands it the messages of W ranks; each rank's messages are made one rank
at a time by the code that ranks run, and nothing but bytes is kept of a rank. Belongs here: that
simulation. Does not belong here: what the ranks hold (``planning_layouts``) and tables.

``python -m benchmarks.planning_ours '{"layout": "rows", "world_size": 64, ...}'`` prints JSON.
"""

from __future__ import annotations

import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from benchmarks.measuring import current_rss, peak_rss
from benchmarks.planning_layouts import LAYOUTS, Layout, Part, object_names, replicated, sharded
from dcp_engine.coordination.interface import Decision, Operation, Outcome, RunIdentity
from dcp_engine.coordination.messages import Event, Heading, Report, decode, encode
from dcp_engine.format.manifest import decode_manifest
from dcp_engine.format.names import new_save_id
from dcp_engine.format.nesting import encode_nesting
from dcp_engine.format.object_codec import encode_object
from dcp_engine.native_storage import (
    CommitRecord,
    FileReport,
    ObjectReport,
    RankReport,
    SaveTicket,
)
from dcp_engine.planning.columns import NO_ALIAS, GlobalPlan
from dcp_engine.planning.load_plan import make_load_columns
from dcp_engine.planning.local import make_local_plan
from dcp_engine.planning.wire import encode_local_plan
from dcp_engine.saver.agreement import Agreement
from dcp_engine.saver.plan_memory import PlanMemory
from dcp_engine.saver.prepare import PreparedState
from dcp_engine.state.values import Box, EntryKind, ObjectValue, TensorValue, Value
from storage_backends.reports import check_reports, make_manifest

CHECKPOINT = "/checkpoints/run-2026-11-21/step-000100"
HEADING = Heading(number=1, kind="save", checkpoint=CHECKPOINT, coordinator=0)
SAMPLE = 8
"""Ranks whose own work is timed."""
_NOTHING = torch.empty(0)
"""Planning never looks at a tensor's memory."""


class SimulatedOperation(Operation):
    """Rank 0's operation; ``incoming`` holds what the other ranks send, by phase."""

    def __init__(self, world_size: int, incoming: dict[str, list[bytes]]) -> None:
        self.rank = self.coordinator_rank = self.number = 0
        self.world_size = world_size
        self._incoming = incoming
        self.seconds: dict[str, float] = {}
        self.kernel: dict[str, float] = {}
        """Of ``seconds``, those that the kernel took: page faults of fresh memory."""
        self.bytes_in: dict[str, list[int]] = {}
        """What each rank receives, by phase."""

    def step(
        self,
        phase: str,
        local: Callable[[], bytes],
        decide: Callable[[list[bytes]], Decision],
        *,
        decide_phase: str | None = None,
    ) -> tuple[bytes, bytes]:
        """Time what the coordinator does between the last report and its answers."""
        own = local()
        framed = self._incoming[phase]
        gc.collect()
        before = _kernel_seconds()
        began = time.process_time()
        payloads = [own, *(decode(message, Report).payload for message in framed[1:])]
        decision = decide(payloads)
        event = encode(
            Event(kind="verdict", common=decision.common, has_answers=decision.per_rank is not None)
        )
        self.seconds[phase] = time.process_time() - began
        self.kernel[phase] = _kernel_seconds() - before
        answers = decision.per_rank or [b""] * self.world_size
        self.bytes_in[phase] = [len(event) + len(answer) for answer in answers]
        return decision.common, answers[0]

    def check(self) -> None:
        """Nobody else fails."""

    def decide_once(self, outcome: Outcome) -> Outcome:
        """Nobody objects."""
        return outcome

    def close(self) -> None:
        """Nothing is held."""


def values_of(layout: Layout, world_size: int, rank: int, tensors: int) -> list[Value]:
    """What ``state.adapters`` says of one rank's state dict."""

    def tensor(part: Part, kind: EntryKind) -> TensorValue:
        boxes = () if 0 in part.sizes else (Box(offsets=part.offsets, sizes=part.sizes),)
        return TensorValue(
            fqn=part.fqn,
            kind=kind,
            dtype=part.dtype,
            shape=part.shape,
            boxes=boxes,
            tensors=(_NOTHING,) * len(boxes),
        )

    values: list[Value] = [
        tensor(part, EntryKind.SHARDED) for part in sharded(layout, world_size, rank, tensors)
    ]
    values += [tensor(part, EntryKind.REPLICATED) for part in replicated()]
    values += [
        ObjectValue(fqn=name, kind=EntryKind.REPLICATED, value={"value": 7})
        for name in object_names()
    ]
    return values


def prepare(values: Sequence[Value], rank: int, seconds: dict[str, list[float]]) -> PreparedState:
    """What ``saver.prepare`` makes of them; the columns' part is timed."""
    nesting = encode_nesting({v.fqn: tuple(v.fqn.split(".")) for v in values}, {})
    objects = {
        v.fqn: encode_object(v.value, fqn=v.fqn) for v in values if isinstance(v, ObjectValue)
    }
    count = len(values) - len(objects)
    began = time.process_time()
    source = make_local_plan(values, np.full(count, NO_ALIAS, np.int32), nesting, rank=rank)
    _note(seconds, "columns", began)
    compared = {v.fqn: 12345 for v in values if v.kind is EntryKind.REPLICATED}
    return PreparedState(source=source, objects=objects, compared=compared)


def agreement(operation: Operation, memory: PlanMemory) -> Agreement:
    """As ``saver.columnar`` makes it."""
    return Agreement(
        operation,
        memory,
        dedup_to_lowest_rank=False,
        strict_replicas=False,
        checkpoint=CHECKPOINT,
    )


def framed(phase: str, step: int, payload: bytes) -> bytes:
    """A report as it lies in the store."""
    return encode(Report(heading=HEADING, step=step, phase=phase, payload=payload))


def measure(layout_name: str, world_size: int, tensors: int, rounds: int) -> dict[str, Any]:
    """All columns of one row."""
    layout = LAYOUTS[layout_name]
    incoming: dict[str, list[bytes]] = {"agree": [], "plan": [], "write": []}
    local: dict[str, list[float]] = {}
    before = current_rss()
    first: PreparedState | None = None
    for rank in range(world_size):
        operation = SimulatedOperation(world_size, incoming)
        timings: dict[str, list[float]] = local if rank < SAMPLE else {}
        prepared = prepare(values_of(layout, world_size, rank, tensors), rank, timings)
        began = time.process_time()
        offer = agreement(operation, PlanMemory()).offer(prepared)
        _note(timings, "fingerprint", began)
        began = time.process_time()
        message = encode_local_plan(prepared.source.plan)
        _note(timings, "encoding (first save)", began)
        incoming["agree"].append(framed("agree", 0, offer))
        incoming["plan"].append(framed("plan", 1, message))
        if rank == 0:
            first = prepared
        del prepared
    assert first is not None
    runs = []
    for number in range(rounds):
        runs.append(_two_saves(first, world_size, incoming))
        if number == 0:
            runs[0]["peak_bytes"] = peak_rss() - before
    result = _medians(runs)
    result["local_seconds"] = {name: statistics.median(times) for name, times in local.items()}
    result["load"] = _loads(layout, world_size, tensors, runs[0]["manifest"], rounds)
    return {
        "engine": "dcp_engine",
        "layout": layout_name,
        "world_size": world_size,
        "tensors": tensors,
        **{name: value for name, value in result.items() if name != "manifest"},
    }


def _two_saves(
    prepared: PreparedState, world_size: int, incoming: dict[str, list[bytes]]
) -> dict[str, Any]:
    memory = PlanMemory()
    first = _save(prepared, world_size, incoming, memory)
    # The second time, every rank offers what it remembers.
    again = dict(incoming)
    again["agree"] = []
    for message in incoming["agree"]:
        fingerprint, _, *values = msgspec.msgpack.decode(decode(message, Report).payload)
        offer = msgspec.msgpack.encode([fingerprint, first["plan_id"], *values])
        again["agree"].append(framed("agree", 0, offer))
    second = _save(prepared, world_size, again, memory)
    if "plan" in second["seconds"]:
        raise RuntimeError("the second save planned anew")
    return {
        "first": first["seconds"],
        "second": second["seconds"],
        "first_kernel": first["kernel"],
        "second_kernel": second["kernel"],
        "first_bytes": first["bytes"],
        "second_bytes": second["bytes"],
        "manifest_bytes": len(first["manifest"]),
        "chunks": first["chunks"],
        "manifest": first["manifest"],
    }


def _save(
    prepared: PreparedState, world_size: int, incoming: dict[str, list[bytes]], memory: PlanMemory
) -> dict[str, Any]:
    operation = SimulatedOperation(world_size, incoming)
    agreeing = agreement(operation, memory)
    answer, _ = operation.step(
        "agree",
        lambda: agreeing.offer(prepared),
        lambda messages: agreeing.decide(messages, new_save_id()),
    )
    agreed = agreeing.settle(answer, prepared)
    plan = agreed.global_plan
    if plan is None:
        raise RuntimeError("the coordinator has no plan")
    reports = reports_of(plan, prepared)
    incoming["write"] = [framed("write", 2, msgspec.msgpack.encode(report)) for report in reports]
    manifests: list[bytes] = []

    def commit(messages: list[bytes]) -> Decision:
        decoded = [msgspec.msgpack.decode(message, type=RankReport) for message in messages]
        checked = check_reports(plan, decoded, range(world_size))
        manifests.append(
            make_manifest(
                plan,
                checked,
                _ticket(agreed.save_id, world_size),
                time=0.0,
                writers={"dcp_engine": "benchmark"},
                block_size=65536,
                extra_files=[],
            )
        )
        record = CommitRecord(
            save_id=agreed.save_id, manifest_size=len(manifests[0]), manifest_xxh3="0" * 32
        )
        return Decision(common=msgspec.msgpack.encode(record))

    operation.step("write", lambda: msgspec.msgpack.encode(reports[0]), commit)
    agreed.remember(memory)
    return {
        "plan_id": agreed.plan_id,
        "seconds": operation.seconds,
        "kernel": operation.kernel,
        "bytes": {
            phase: {
                "out": statistics.mean(map(len, incoming[phase])),
                "out_max": max(map(len, incoming[phase])),
                "in": statistics.mean(received),
                "in_max": max(received),
            }
            for phase, received in operation.bytes_in.items()
        },
        "manifest": manifests[0],
        "chunks": int(plan.files.chunks.sum()),
    }


def reports_of(plan: GlobalPlan, prepared: PreparedState) -> list[RankReport]:
    """What the ranks would report if they had written ``plan``."""
    reports = [
        RankReport(
            rank=rank, files=[], chunks=0, digests_size=48210, digests_xxh3="5" * 32, objects=[]
        )
        for rank in range(plan.world_size)
    ]
    for rank, number, nbytes, count in zip(
        plan.files.rank.tolist(),
        plan.files.number.tolist(),
        plan.files.data_bytes.tolist(),
        plan.files.chunks.tolist(),
        strict=True,
    ):
        report = reports[rank]
        report.files.append(FileReport(number, 139264, 139264 + nbytes))
        reports[rank] = msgspec.structs.replace(report, chunks=report.chunks + count)
    for name, owner in zip(plan.objects.names, plan.objects.owners.tolist(), strict=True):
        data = bytes(prepared.objects[name].data)
        reports[owner].objects.append(ObjectReport(name, False, data, 0, 0, len(data)))
    return reports


def _ticket(save_id: str, world_size: int) -> SaveTicket:
    return SaveTicket(
        save_id=save_id,
        rank=0,
        world_size=world_size,
        coordinator_rank=0,
        identity=RunIdentity(run_id="", restart_count=0, group="", host="", boot_id="", pid=1),
    )


def _loads(
    layout: Layout, world_size: int, tensors: int, data: bytes, rounds: int
) -> dict[str, float]:
    """Open the manifest and plan one rank's load: by as many ranks as saved, and by other
    numbers."""
    result: dict[str, list[float]] = {}
    others = {"same": world_size, "three quarters": world_size * 3 // 4, "eight": 8}
    for title, loading in others.items():
        values = [
            value
            for value in values_of(layout, loading, loading // 2, tensors)
            if isinstance(value, TensorValue)
        ]
        for _ in range(rounds):
            gc.collect()
            began = time.process_time()
            manifest = decode_manifest(data)
            _note(result, "open", began)
            source = make_load_columns(values, manifest, rank=loading // 2, world_size=loading)
            _note(result, title, began)
            if not len(source.columns.tensor):
                raise RuntimeError("nothing to load")
            del manifest, source
    return {title: statistics.median(times) for title, times in result.items()}


def _kernel_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_stime


def _note(seconds: dict[str, list[float]], name: str, began: float) -> None:
    seconds.setdefault(name, []).append(time.process_time() - began)


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    result = dict(runs[0])
    for save in ("first", "second", "first_kernel", "second_kernel"):
        result[save] = {
            phase: statistics.median(run[save][phase] for run in runs) for phase in runs[0][save]
        }
    return result


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(
        json.dumps(
            measure(request["layout"], request["world_size"], request["tensors"], request["rounds"])
        )
    )
