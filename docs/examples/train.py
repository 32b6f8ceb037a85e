"""Train a small language model with FSDP2 and AdamW, and save it with dcp_engine.

    torchrun --nproc-per-node 2 docs/examples/train.py --checkpoint /tmp/ckpt --steps 24
    torchrun --nproc-per-node 2 docs/examples/train.py --checkpoint /tmp/ckpt --steps 48 --resume
    torchrun --nproc-per-node 2 docs/examples/train.py --checkpoint /tmp/ckpt --async process

Every few steps the checkpoint is replaced in place. A job that was killed at any moment resumes
from the last one that was committed, and on as many ranks ends with the very same bits as a job
that was never interrupted: parameters, optimizer state, the place in the data and each rank's
random state are all in the checkpoint. With ``--async`` training waits only while the state is
copied; a thread, or a worker process of each rank, saves the copy.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reporting
import torch
import torch.distributed as dist
from model import ModelConfig, Transformer
from text import Windows, read_corpus
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.optim import AdamW

import dcp_engine


def build(config: ModelConfig, seed: int, learning_rate: float) -> tuple[nn.Module, AdamW]:
    """The sharded model and its optimizer; all ranks start from the same values."""
    torch.manual_seed(seed)
    model = Transformer(config)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = AdamW(model.parameters(), lr=learning_rate)
    # AdamW makes its state at the first step. Making it here gives `load` tensors to fill.
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return model, optimizer


class Training:
    """Everything that has to survive. `state_dict` and `load_state_dict` make it a Stateful."""

    def __init__(self, model: nn.Module, optimizer: AdamW) -> None:
        self.model = model
        self.optimizer = optimizer
        self.step = 0
        self.position = 0
        """How many windows of text have been used."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors are the live ones, so that `load` fills them in place."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        groups = self.optimizer.param_groups
        return {
            "model": self.model.state_dict(),
            # By name, where torch's own optimizer state dict counts: names survive resharding.
            "optimizer": {names[p]: state for p, state in self.optimizer.state.items()},
            "hyperparameters": [{k: v for k, v in g.items() if k != "params"} for g in groups],
            # Each rank draws its own dropout masks.
            "rng": dcp_engine.PerRank(torch.get_rng_state()),
            "progress": {"step": self.step, "position": self.position},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what is not a tensor of model or optimizer; those are filled already."""
        for group, saved in zip(self.optimizer.param_groups, state["hyperparameters"], strict=True):
            group.update(saved)
        torch.set_rng_state(state["rng"].value)
        self.step = state["progress"]["step"]
        self.position = state["progress"]["position"]


def train_step(training: Training, data: Windows, batch: int) -> torch.Tensor:
    """One step on a global batch of which every rank takes its rows; returns the mean loss."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = data.batch(training.position, batch)[rank::world_size]
    logits = training.model(rows[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    training.optimizer.step()
    training.optimizer.zero_grad()
    training.step += 1
    training.position += batch
    mean = loss.detach() / world_size
    dist.all_reduce(mean)
    return mean


class Saves:
    """Saves of the training, synchronous or not, into one directory.

    Args:
        kind: ``"thread"``, ``"process"``, or None: training waits.
    """

    def __init__(self, checkpoint: Path, kind: str | None, say: Callable[[str], None]) -> None:
        self.checkpoint = checkpoint
        self.kind = kind
        self.say = say
        self._pending: dcp_engine.AsyncSaveResponse | None = None

    def save(self, training: Training) -> None:
        """When it returns, the training may go on."""
        begun = time.perf_counter()
        state = {"training": training}
        writer = dcp_engine.FileSystemWriter(self.checkpoint)
        if self.kind is None:
            dcp_engine.save(state, storage_writer=writer)
            how = "saved"
        else:
            self._look_at_the_last_one()
            kind = dcp_engine.AsyncCheckpointerType(self.kind)
            self._pending = dcp_engine.async_save(
                state, storage_writer=writer, async_checkpointer_type=kind
            )
            how = "copied, to be saved in the background,"
        self.say(f"step {training.step:4d}  {how} in {time.perf_counter() - begun:.2f} s")

    def finish(self) -> None:
        """Wait for the last save; without it the training was in vain."""
        if self._pending is not None:
            self._pending.result()

    def _look_at_the_last_one(self) -> None:
        """A failure has left the checkpoint before it as it was, on all ranks."""
        if self._pending is None:
            return
        try:
            self._pending.result()
        except dcp_engine.CheckpointException as error:
            ranks = sorted(error.failures)
            self.say(f"a save failed on ranks {ranks} ({error.kind}); training goes on")


def main() -> None:
    args = parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    if args.results is not None:
        reporting.mark_started(args.results, rank)
    config = ModelConfig(width=args.width, layers=args.layers)
    model, optimizer = build(config, args.seed, args.learning_rate)
    training = Training(model, optimizer)
    data = Windows(read_corpus(), config.context, args.seed)
    torch.manual_seed(args.seed + 1 + rank)

    if args.resume:
        dcp_engine.load(
            {"training": training},
            storage_reader=dcp_engine.FileSystemReader(args.checkpoint),
            per_rank="skip" if args.other_world_size else "error",
        )
        say(f"resumed at step {training.step} from {args.checkpoint}")

    def report(name: str) -> None:
        if args.results is not None:
            tree = {"training": training.state_dict()}
            reporting.write_digests(args.results / f"{name}.json", tree, rank)

    saves = Saves(args.checkpoint, args.background, say)
    while training.step < args.steps:
        begun = time.perf_counter()
        loss = train_step(training, data, args.batch)
        took = time.perf_counter() - begun
        say(f"step {training.step:4d}/{args.steps}  loss {loss.item():.4f}  {took:.2f} s")
        if training.step % args.save_every == 0 or training.step == args.steps:
            saves.save(training)
            report(f"step{training.step:06d}")

    saves.finish()
    report("final")
    if args.results is not None:
        reporting.mark_finished(args.results, rank)
    dist.barrier()
    dist.destroy_process_group()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory, replaced whole")
    parser.add_argument("--steps", type=int, default=24, help="train up to this step")
    parser.add_argument("--save-every", type=int, default=4, help="steps between saves")
    parser.add_argument(
        "--async",
        dest="background",
        choices=["thread", "process"],
        help="save while training goes on; by default training waits",
    )
    parser.add_argument("--resume", action="store_true", help="begin with what --checkpoint holds")
    parser.add_argument(
        "--other-world-size",
        action="store_true",
        help="resume on another number of ranks: every rank keeps its own fresh random state",
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16, help="windows of text per step, all ranks")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--results", type=Path, help="where to leave digests of every tensor")
    return parser.parse_args()


if __name__ == "__main__":
    main()
