"""What the end-to-end tests share: a state, saves and loads of it, and what a refusal must say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dcp_engine as dcp
from dcp_engine.errors import KINDS
from dcp_engine.format.digest import xxh3_128_hex
from storage_backends.sharded_reader import ShardedReader
from storage_backends.sharded_writer import ShardedWriter

Place = Path | dcp.ByteStore
EXTRA = {"config.json": "{}", "notes/a": b"some notes"}


def state(value: float = 1.0) -> dict[str, Any]:
    """Tensors of every element size, an alias, objects inline and in the file."""
    weight = torch.arange(24, dtype=torch.float32).reshape(4, 6) + value
    return {
        "model": {
            "weight": weight,
            "tied": weight,
            "half": torch.full((5,), value, dtype=torch.float16),
            "mask": torch.tensor([True, False, True]),
        },
        "large": torch.full((40_000,), value),
        "step": value,
        "blob": [str(value)] * 3000,
    }


def empty() -> dict[str, Any]:
    """A destination for ``state``; what is in it is never what was saved."""
    weight = torch.full((4, 6), -1.0)
    return {
        "model": {
            "weight": weight,
            "tied": weight,
            "half": torch.full((5,), -1.0, dtype=torch.float16),
            "mask": torch.tensor([False, True, False]),
        },
        "large": torch.full((40_000,), -1.0),
        "step": None,
        "blob": None,
    }


def save(place: Place, content: dict[str, Any], *, no_dist: bool = True, **options: Any) -> None:
    """Save from this process alone."""
    dcp.save(content, storage_writer=writer(place), no_dist=no_dist, timeout=60, **options)


def load(place: Place, into: dict[str, Any], **options: Any) -> dcp.LoadReport:
    """Load into this process alone."""
    return dcp.load(into, storage_reader=reader(place), no_dist=True, timeout=60, **options)


def writer(place: Place) -> ShardedWriter:
    if isinstance(place, Path):
        return dcp.FileSystemWriter(place)
    return ShardedWriter(lambda _: place, place.url)


def reader(place: Place) -> ShardedReader:
    if isinstance(place, Path):
        return dcp.FileSystemReader(place)
    return ShardedReader(lambda _: place, place.url)


def value_at(place: Place) -> float:
    """The value that ``state`` was made with; fails if what is loaded is not whole."""
    loaded = empty()
    load(place, loaded)
    expected = state(loaded["step"])
    assert loaded["blob"] == expected["blob"]
    assert torch.equal(loaded["large"], expected["large"])
    for name, tensor in expected["model"].items():
        assert torch.equal(loaded["model"][name], tensor), name
    return float(loaded["step"])


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Everything below ``root``: files with their content, directories, links."""
    found: dict[str, bytes | None] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        found[name] = path.read_bytes() if path.is_file() and not path.is_symlink() else None
    return found


def data_of(root: Path) -> Path:
    """The data directory that the manifest names."""
    return root / f"data-{json.loads((root / 'manifest.json').read_bytes())['save_id']}"


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """What must come out of a call, and what it must name."""

    error: type[dcp.CheckpointError]
    kind: str
    file: str | None = None
    tensor: str | None = None


def refused(call: Callable[[], object], expected: Refusal, place: Path | str) -> str:
    """Make ``call``, which must fail just so; returns the text of its error.

    The text names the checkpoint, and file, tensor and rank where the error has them, and says
    what to do.
    """
    try:
        call()
    except dcp.CheckpointException as caught:
        error = caught
    else:
        raise AssertionError(f"not refused: {expected}")
    assert list(error.failures) == [0], error
    cause = error.failures[0][0]
    text = str(error)
    assert isinstance(cause, expected.error), text
    assert (error.kind, cause.kind) == (expected.kind, expected.kind), text
    assert expected.kind in KINDS
    assert cause.checkpoint == str(place), text
    assert cause.rank == 0, text
    assert cause.file == expected.file, text
    assert cause.tensor == expected.tensor, text
    assert cause.hint, text
    for named in (str(place), expected.file, expected.tensor, "rank 0", cause.hint[1:]):
        assert named is None or named in text, (named, text)
    return text


def forge(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as somebody would who makes its digest right again."""
    path = root / "manifest.json"
    fields = json.loads(path.read_bytes())
    del fields["manifest_xxh3_128"]
    change(fields)
    write_manifest(path, json.dumps(fields, separators=(",", ":")))


def write_manifest(path: Path, text: str) -> None:
    """``text`` is the whole JSON object but for its digest."""
    body = text.removesuffix("}").encode()
    path.write_bytes(body + b',"manifest_xxh3_128":"%b"}\n' % xxh3_128_hex(body).encode())
