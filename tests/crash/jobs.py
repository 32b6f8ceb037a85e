"""What the children of the crash tests do. Runs in processes of the fork server.

Belongs here: functions ``f(say, ...)``. Does not belong here: killing and judging (the tests).
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import dcp_engine as dcp

__all__ = [
    "as_nobody",
    "destination",
    "large",
    "load_alone",
    "save_alone",
    "save_for_ever",
    "state",
    "value_of",
    "with_few_descriptors",
    "with_little_memory",
    "with_small_files",
]

ROWS = 60_000
"""Of the sharded tensor: 480 kB a rank of two."""


def state(value: float, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """A checkpoint that holds one number everywhere, on some 1 MB; sharded over ``mesh``."""
    w: Any = torch.full((ROWS, 4), value)
    if mesh is not None:
        # Without a word to the other rank, which may be dead.
        local = w[: ROWS // mesh.size()]
        w = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    return {
        "model": {"w": w, "b": torch.full((1000,), value)},
        "long": [value] * 2000,
        "step": value,
    }


def destination() -> dict[str, Any]:
    """What ``state`` is loaded into, on one rank."""
    return state(-1.0)


def value_of(loaded: dict[str, Any]) -> float:
    """The one number that it holds; fails for a mixture."""
    w = loaded["model"]["w"]
    w = w.to_local() if isinstance(w, DTensor) else w
    values = {
        *w.unique().tolist(),
        *loaded["model"]["b"].unique().tolist(),
        *loaded["long"],
        loaded["step"],
    }
    assert len(values) == 1, f"a mixture of {sorted(values)}"
    return float(values.pop())


@contextmanager
def joined(rank: int, world_size: int, port: int, prefix: str) -> Iterator[None]:
    """A gloo group over the store at ``port``."""
    timeout = timedelta(seconds=60)
    store = dist.TCPStore("localhost", port, None, False, timeout=timeout, wait_for_workers=False)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(prefix, store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    yield
    dist.destroy_process_group()


def save_for_ever(
    say: Callable[..., None],
    rank: int,
    world_size: int,
    port: int,
    prefix: str,
    path: str,
    first: float,
    count: int,
    timeout: float,
) -> None:
    """Save ``first``, ``first + 1`` ... to one place, and say so before and after each; until
    somebody ends it, or ``count`` are done. ``timeout`` is for each save: a rank that is dead
    before a save begins cannot be told from one that is late."""
    with joined(rank, world_size, port, prefix):
        mesh = init_device_mesh("cpu", (world_size,))
        say("ready", rank, os.getpid())
        for number in range(count):
            value = first + number
            say("begins", rank, value)
            try:
                dcp.save(state(value, mesh), checkpoint_id=path, timeout=timeout, stall_timeout=1.5)
            except dcp.CheckpointException as error:
                say("failed", rank, value, error.kind)
                return
            say("returned", rank, value)


def save_alone(path: str, value: float) -> str | None:
    """Save from this process; None, or the kind and text of the error."""
    return _tried(lambda: dcp.save(state(value), checkpoint_id=path, no_dist=True))


def load_alone(path: str) -> float | str:
    """The number that is there, or the kind and text of the error."""
    loaded = destination()
    problem = _tried(lambda: dcp.load(loaded, checkpoint_id=path, no_dist=True))
    return value_of(loaded) if problem is None else problem


def _tried(call: Callable[[], object]) -> str | None:
    try:
        call()
    except dcp.CheckpointException as error:
        return f"{error.kind}: {error}"
    return None


def with_few_descriptors(say: Callable[..., None], path: str, value: float, most: int) -> None:
    """Save ``value`` and load, with 0, 1, ... ``most`` descriptors left; say what became of it."""
    assert save_alone(path, value) is None  # what is imported at the first save is, by now
    assert load_alone(path) == value
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    for left in range(most + 1):
        taken = []
        try:
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        for descriptor in taken[:left]:
            os.close(descriptor)
        saved = save_alone(path, value + left)
        loaded = load_alone(path)
        for descriptor in taken[left:]:
            os.close(descriptor)
        say("tried", left, saved, loaded, load_alone(path), len(os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    say("at last", save_alone(path, value - 1), load_alone(path))


def large(value: float) -> torch.Tensor:
    """32 MiB that do not lie in memory as they are stored."""
    return torch.full((2048, 4096), value).t()


def with_little_memory(say: Callable[..., None], path: str, value: float, spare: int) -> None:
    """Save and load with ``spare`` bytes of address space left."""
    tensor, into = large(value), large(-1.0)
    # What is imported at the first save is, by then.
    dcp.save({"w": torch.ones(1)}, checkpoint_id=f"{path} warm", no_dist=True)
    dcp.load({"w": torch.ones(1)}, checkpoint_id=f"{path} warm", no_dist=True)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + spare, hard))
    saved = _tried(lambda: dcp.save({"w": tensor}, checkpoint_id=path, no_dist=True))
    loaded = _tried(lambda: dcp.load({"w": into}, checkpoint_id=path, no_dist=True))
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    say("tried", saved, loaded)
    again = _tried(lambda: dcp.load({"w": into}, checkpoint_id=path, no_dist=True))
    say("now", again, into.unique().tolist())


def with_small_files(say: Callable[..., None], path: str, value: float, sizes: list[int]) -> None:
    """Save with no file allowed to be larger than each of ``sizes`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in sizes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        saved = save_alone(path, value)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        say("tried", size, saved, load_alone(path), sorted(os.listdir(path)))


def as_nobody(say: Callable[..., None], path: str, value: float) -> None:
    """Save and load as a user who may only read."""
    # What a load imports lies where only we may look, if the environment does: import it now.
    load_alone(path)
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    say("tried", save_alone(path, value), load_alone(path))
