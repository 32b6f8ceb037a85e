"""Absurd claims in a process that may take 256 MiB more than it has: all are refused there too.

``tests/fuzz`` counts what Python and numpy allocate; this bounds all memory, also torch's.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.end_to_end.checkpoints import forge, save, state

CHILD = """
import resource, sys
import torch
import dcp_engine as dcp
from tests.end_to_end.checkpoints import empty, load
from pathlib import Path

torch.set_num_threads(1)
good, *places = map(Path, sys.argv[1:])
into = empty()
load(good, into)  # whatever is imported or started late is there now
pages = int(Path("/proc/self/statm").read_text().split()[0])
most = pages * resource.getpagesize() + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
for place in places:
    try:
        with dcp.open(place) as checkpoint:
            for name in checkpoint:
                value = checkpoint[name]
                value.load() if isinstance(value, dcp.LazyObject) else value[...]
    except dcp.CheckpointError as error:
        print(place.name, error.kind)
    else:
        print(place.name, "read")
load(good, into)
print("alive")
"""


def test_absurd_claims_in_little_memory(tmp_path: Path) -> None:
    good = tmp_path / "good"
    save(good, state())
    huge = 1 << 50

    def tensor(fields: dict[str, object], size: int | None) -> None:
        tensors, files = fields["tensors"], fields["data_files"]
        assert isinstance(tensors, dict) and isinstance(files, dict)
        row = tensors["names"].index("large")
        ndims = tensors["ndims"]
        tensors["shapes"][row * ndims if isinstance(ndims, int) else sum(ndims[:row])] = huge
        if size is not None:
            files["size"] = [size]

    def chunks(fields: dict[str, object]) -> None:
        """A table of ten thousand chunks of a tensor of 2**50 elements."""
        tensors = fields["tensors"]
        assert isinstance(tensors, dict)
        tensor(fields, None)
        row = tensors["names"].index("large")
        stored = [i for i, alias in enumerate(tensors["aliases"]) if alias == 0]
        del tensors["start"][stored.index(row)]
        if isinstance(tensors["file"], list):
            del tensors["file"][stored.index(row)]
        tensors["table_rows"] = [row]
        tensors["tables"] = [["0:1", 1, 0, [0] * 10_000]]

    cases = {
        "in-bounds": lambda fields: tensor(fields, 1 << 60),
        "behind-the-end": lambda fields: tensor(fields, None),
        "chunks": chunks,
        "metadata": lambda fields: fields.__setitem__(
            "user_metadata", {"a": [[0] * 1000] * 100, "b": "x" * 1_000_000}
        ),
        "digests": lambda fields: fields["digest_files"].__setitem__("size", [1 << 60]),
        "extra-world": lambda fields: fields.__setitem__("world_size", 1_000_000),
    }
    places = []
    for name, change in cases.items():
        places.append(tmp_path / name)
        shutil.copytree(good, places[-1])
        forge(places[-1], change)
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(good), *map(str, places)],
        capture_output=True, text=True, timeout=120, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert dict(line.split() for line in result.stdout.splitlines()[:-1]) == {
        "in-bounds": "file_short",
        "behind-the-end": "chunk_out_of_bounds",
        "chunks": "manifest_invalid",
        "metadata": "read",
        "digests": "file_short",
        "extra-world": "read",
    }
    assert result.stdout.splitlines()[-1] == "alive"
