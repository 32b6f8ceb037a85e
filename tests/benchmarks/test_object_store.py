"""The benchmark of slow media runs, and its own medium does what it says."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import object_store
from benchmarks.throttled_fs import ThrottledFileSystem


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    object_store.add_arguments(parser)
    small = ["--size", "4", "--streams", "2", "--rounds", "1", "--small", "20", "--latency", "0.1"]
    places = ["--memory", str(tmp_path), "--json", str(tmp_path / "numbers.json")]
    object_store.main(parser.parse_args([*small, "--without-dcp", *places]))
    rows = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert [(row["state"], row["way"]) for row in rows] == [
        (state, way)
        for state in ("model, 4 MiB", "20 x 1 KiB")
        for way in (object_store.OURS, object_store.OURS_FSSPEC)
    ]
    assert all(row["requests"] > 0 and row["seconds"] > 0 for row in rows)
    assert "of streams x pace" in capsys.readouterr().out


def test_the_file_system_reads_ranges(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(100)))
    fs = ThrottledFileSystem(latency=0.0, bandwidth=1e9, streams=2)
    path = f"throttled://{tmp_path}/f"
    assert fs.cat_file(path, 10, 20) == bytes(range(10, 20))
    assert fs.cat_ranges([path] * 3, [0, 50, 90], [1, 52, 200]) == [
        bytes([0]),
        bytes([50, 51]),
        bytes(range(90, 100)),
    ]
    assert fs.info(path)["size"] == 100
    with fs.open(path) as file:
        file.seek(30)
        assert file.read(5) == bytes(range(30, 35))
    assert fs.peak_streams <= 2
    with pytest.raises(NotImplementedError):
        fs.open(path, "wb")
