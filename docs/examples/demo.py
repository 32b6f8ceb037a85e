"""The whole story on one machine: train, kill in the middle of a save, resume, save in the
background, reshard, damage.

    python docs/examples/demo.py

Prints what it does and what it finds. Exits with 1 if anything differs from what is promised.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from jobs import Job, JobFailed
from reporting import digest
from safetensors import safe_open

import dcp_engine

STEPS = 24
SAVE_EVERY = 4
BACKGROUND_STEPS = 16
"""How far the job goes that saves in the background."""
ATTEMPTS = 4
MIDDLE = 1_000_000
"""Bytes of a save that are on disk before the kill; a save is 40 MB."""


class Broken(Exception):
    """Something is not as promised."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Train, kill, resume, reshard, damage.")
    parser.add_argument("--directory", type=Path, help="work here and keep everything")
    args = parser.parse_args()
    begun = time.perf_counter()
    work = args.directory or Path(tempfile.mkdtemp(prefix="dcp_engine-demo-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        run(work.resolve())
    except (Broken, JobFailed) as error:
        print(f"\nFAILED: {error}\nEverything is kept in {work}", file=sys.stderr, flush=True)
        return 1
    if args.directory is None:
        shutil.rmtree(work)
    print(f"\nAll as promised, in {time.perf_counter() - begun:.0f} s.")
    return 0


def run(work: Path) -> None:
    uninterrupted, interrupted = work / "uninterrupted", work / "interrupted"
    background = work / "background"
    with step(1, f"train {STEPS} steps on 2 ranks, without interruption"):
        train(2, work / "results-1", uninterrupted)
        expected = read_digests(work / "results-1" / "final.json")
    with step(2, "the same again, killed with SIGKILL in the middle of a save"):
        kill_during_save(work, interrupted)
        shutil.copytree(interrupted, background)
        check_survivor(work, interrupted)
    with step(3, "resume on 2 ranks and train to the end"):
        train(2, work / "results-3", interrupted, "--resume")
        compare(read_digests(work / "results-3" / "final.json"), expected, "uninterrupted run")
        check_no_garbage(interrupted)
    with step(4, "resume the killed job again, saving in the background; kill a worker in a save"):
        kill_worker_during_save(work / "results-4", background)
        until = read_digests(work / "results-1" / f"step{BACKGROUND_STEPS:06d}.json")
        compare(read_digests(work / "results-4" / "final.json"), until, "uninterrupted run")
        check_no_garbage(background)
        load_only(2, work / "results-4-loaded", background)
        compare(read_digests(work / "results-4-loaded" / "final.json"), until, "uninterrupted run")
    with step(5, "load on 4 ranks, and on 1"):
        for ranks in (4, 1):
            print(f"  {ranks} rank{'s' * (ranks > 1)}:")
            results = work / f"results-5-{ranks}"
            load_only(ranks, results, interrupted, "--other-world-size")
            compare(read_digests(results / "final.json"), expected, "uninterrupted run")
    with step(6, "open the data files with the safetensors library alone"):
        whole = read_with_safetensors(interrupted, expected)
        compare({name: digest(t) for name, t in whole.items()}, expected, "uninterrupted run")
    with step(7, "flip one bit of a copy and load it"):
        check_damage(work, interrupted, whole)


@contextmanager
def step(number: int, title: str) -> Iterator[None]:
    begun = time.perf_counter()
    print(f"\n[{number}/7] {title}", flush=True)
    yield
    print(f"  ({time.perf_counter() - begun:.0f} s)", flush=True)


def found(text: str) -> None:
    print(f"  -> {text}", flush=True)


def train(ranks: int, results: Path, checkpoint: Path, *more: str) -> None:
    with start(ranks, results, checkpoint, *more) as job:
        job.wait()


def load_only(ranks: int, results: Path, checkpoint: Path, *more: str) -> None:
    """Load and leave the digests of what was loaded, without training."""
    train(ranks, results, checkpoint, "--resume", "--steps", "0", *more)


def start(ranks: int, results: Path, checkpoint: Path, *more: str) -> Job:
    arguments = ["--checkpoint", checkpoint, "--steps", STEPS, "--save-every", SAVE_EVERY]
    return Job(ranks, results, [*map(str, arguments), *more])


def read_digests(file: Path) -> dict[str, str]:
    digests: dict[str, str] = json.loads(file.read_text())
    return digests


def compare(actual: Mapping[str, str], expected: Mapping[str, str], what: str) -> None:
    """Every tensor of one, and no other, must be in the other with the same bits."""
    differing = [n for n in sorted({*actual, *expected}) if actual.get(n) != expected.get(n)]
    if differing or not expected:
        names = ", ".join(differing[:5])
        raise Broken(f"{len(differing)} of {len(expected)} tensors differ from {what}: {names}")
    found(f"all {len(expected)} tensors (weights, AdamW state) bit-identical to the {what}")


def committed_id(checkpoint: Path) -> str | None:
    """The save id that the manifest names, or None where there is no manifest."""
    try:
        manifest = (checkpoint / "manifest.json").read_text()
    except FileNotFoundError:
        return None
    save_id: str = json.loads(manifest)["save_id"]
    return save_id


def data_directories(checkpoint: Path) -> dict[str, Path]:
    """Data directories by save id."""
    return {d.name.removeprefix("data-"): d for d in checkpoint.glob("data-*")}


def bytes_below(directory: Path) -> int:
    """Bytes of the data files that are there at this moment."""
    total = 0
    for file in directory.glob("*.safetensors"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


def kill_during_save(work: Path, checkpoint: Path) -> None:
    """Kill a job while a checkpoint is being replaced; try again where the commit was faster."""
    for attempt in range(1, ATTEMPTS + 1):
        resume = ["--resume"] if committed_id(checkpoint) else []
        with start(2, work / f"results-2-{attempt}", checkpoint, *resume) as job:
            before, target = wait_for_save(job, checkpoint, data_directories(checkpoint))
            job.kill()
        if committed_id(checkpoint) == before and target.is_dir():
            size = bytes_below(target) / 1e6
            found(f"killed while {target.name} was written: {size:.1f} MB are there, no commit")
            return
        found("that save was committed before the signal arrived; trying again")
    raise Broken(f"no save could be interrupted in {ATTEMPTS} attempts")


def wait_for_save(job: Job, checkpoint: Path, others: Iterable[str]) -> tuple[str, Path]:
    """Wait until a save that is to replace a committed one is under way, and is none of
    ``others``. Returns the save id of the committed one and the data directory of the new one."""
    seen = set(others)
    while job.running:
        # In this order: what is listed and not named afterwards is not committed yet.
        directories = data_directories(checkpoint)
        committed = committed_id(checkpoint)
        if committed is not None:
            seen.add(committed)
            for save_id, directory in directories.items():
                if save_id not in seen and bytes_below(directory) >= MIDDLE:
                    return committed, directory
        time.sleep(0.001)
    job.wait()
    raise Broken("the job ended before a save could be interrupted")


def kill_worker_during_save(results: Path, checkpoint: Path) -> None:
    """Train to the end with worker processes that save, of which one is killed while it writes.
    Training does not notice until it asks how the save went, and the next one works."""
    others = set(data_directories(checkpoint))
    arguments = ["--resume", "--async", "process", "--steps", str(BACKGROUND_STEPS)]
    with start(2, results, checkpoint, *arguments) as job:
        while True:
            _, target = wait_for_save(job, checkpoint, others)
            others.add(target.name.removeprefix("data-"))
            if job.kill_worker(1) and wait_for_failure(job, checkpoint, target):
                break
            found("that save was committed before the signal arrived; trying again")
        found(f"rank 1's worker killed while {target.name} was written; training goes on")
        job.wait()
    failures = [line for line in job.lines if line.startswith("a save failed")]
    if failures != ["a save failed on ranks [1] (worker_died); training goes on"]:
        raise Broken(f"one save was to fail, on rank 1: {failures}")
    found("that save failed on all ranks, by name, and the next ones were committed")


def wait_for_failure(job: Job, checkpoint: Path, target: Path) -> bool:
    """Whether the save to ``target`` fails, which training says when it is about to save again."""
    while job.running:
        if any(line.startswith("a save failed") for line in list(job.lines)):
            return True
        if committed_id(checkpoint) == target.name.removeprefix("data-"):
            return False
        time.sleep(0.01)
    job.wait()
    raise Broken("the job ended without a word about the save whose worker was killed")


def check_survivor(work: Path, checkpoint: Path) -> None:
    """What can be loaded after the kill is one save of the uninterrupted run, whole."""
    load_only(2, work / "results-2-survivor", checkpoint)
    survivor = read_digests(work / "results-2-survivor" / "final.json")
    saves = {f.stem: read_digests(f) for f in sorted((work / "results-1").glob("step*.json"))}
    same = [name for name, digests in saves.items() if digests == survivor]
    if len(same) != 1:
        raise Broken(f"what survived equals {same or 'none'} of the saves {list(saves)}")
    found(f"the checkpoint before it is whole: {len(survivor)} tensors, those of {same[0]}")


def check_no_garbage(checkpoint: Path) -> None:
    """What the killed job left behind went with the next save, whose ranks could tell from its
    owner record that it is dead. Without that record, age is the only proof: ``prune``."""
    committed = committed_id(checkpoint)
    others = {k: d for k, d in data_directories(checkpoint).items() if k != committed}
    if any((directory / "owner.json").exists() for directory in others.values()):
        raise Broken(f"data of a dead job is left: {sorted(others)}")
    if others:
        found("killed before it could say whose data it is, so the next save left it; pruning")
        dcp_engine.prune(checkpoint, older_than=0)
    if set(data_directories(checkpoint)) != {committed}:
        raise Broken(f"other data than that of the manifest is left: {sorted(others)}")
    found("the data that the killed job had left behind is gone")


def read_with_safetensors(checkpoint: Path, expected: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Whole tensors, put together from the shards that the files name ``<name>@<offsets>``."""
    shards: dict[str, list[tuple[tuple[int, ...], torch.Tensor]]] = {}
    others = 0
    files = sorted(
        data_directories(checkpoint)[committed_id(checkpoint) or ""].glob("*.safetensors")
    )
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a mapping)
                name, offsets = split_key(key)
                if name in expected:
                    shards.setdefault(name, []).append((offsets, opened.get_tensor(key)))
                else:
                    others += 1
    size = sum(file.stat().st_size for file in files) / 1e6
    count = sum(map(len, shards.values()))
    found(f"{len(files)} files, {size:.1f} MB: {count} shards, and {others} entries of other state")
    return {name: put_together(parts) for name, parts in shards.items()}


def split_key(key: str) -> tuple[str, tuple[int, ...]]:
    match = re.fullmatch(r"(.+)@(\d+(?:,\d+)*)", key)
    if match is None:
        return key, ()
    return match[1], tuple(int(offset) for offset in match[2].split(","))


def put_together(parts: list[tuple[tuple[int, ...], torch.Tensor]]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0][1]
    ends = [[o + s for o, s in zip(offsets, t.shape, strict=True)] for offsets, t in parts]
    shape = [max(dimension) for dimension in zip(*ends, strict=True)]
    whole = torch.empty(shape, dtype=parts[0][1].dtype)
    for offsets, tensor in parts:
        whole[tuple(slice(o, o + s) for o, s in zip(offsets, tensor.shape, strict=True))] = tensor
    return whole


def check_damage(work: Path, checkpoint: Path, whole: Mapping[str, torch.Tensor]) -> None:
    """One flipped bit: the load must name the file and the tensor. No torchrun is needed here,
    and no model: any mapping of names to tensors of the right shape can be loaded into."""
    copy = work / "damaged"
    shutil.copytree(checkpoint, copy)
    destination = {name: torch.empty_like(tensor) for name, tensor in whole.items()}
    reader = dcp_engine.FileSystemReader(copy)
    dcp_engine.load(destination, storage_reader=reader, no_dist=True)
    different = [name for name in whole if not destination[name].equal(whole[name])]
    if different:
        raise Broken(f"the undamaged copy loads differently: {different[:5]}")
    found("before: the copy loads, with equal tensors")

    file = max(copy.glob("data-*/*.safetensors"))
    key, position = middle_of_largest(file)
    with file.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1]))
    found(f"byte {position} of {file.name}, in {key}: {byte:#04x} is now {byte ^ 1:#04x}")
    try:
        dcp_engine.load(destination, storage_reader=dcp_engine.FileSystemReader(copy), no_dist=True)
    except dcp_engine.CheckpointError as error:
        named = (error.kind, Path(error.file or "").name, error.tensor)
        if named != ("digest_mismatch", file.name, split_key(key)[0]):
            raise Broken(f"the error names {named}") from error
        found(f"refused: {error.message}")
        found(f"the error names kind {error.kind}, file {error.file}, tensor {error.tensor}")
    else:
        raise Broken("the damaged copy was loaded without a word")


def middle_of_largest(file: Path) -> tuple[str, int]:
    """The entry of a safetensors file with most bytes, and a position in its middle."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    key = max(spans, key=lambda name: spans[name][1] - spans[name][0])
    begin, end = spans[key]
    return key, 8 + length + (begin + end) // 2


if __name__ == "__main__":
    sys.exit(main())
