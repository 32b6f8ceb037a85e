"""``verify``: the files hold what the manifest names, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dcp_engine as dcp
from dcp_engine.format.digest import xxh3_128_hex

STATE = {
    "a": torch.ones(300),
    "b": torch.ones(300),
    "view": torch.ones(4, 6).t(),
    "empty": torch.empty(0, 3),
    "blob": "x" * 9000,
    "number": 1,
    "own": dcp.PerRank(torch.ones(5)),
}


def test_what_the_engine_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tied = {**STATE, "tied": STATE["a"]}
    dcp.save(tied, checkpoint_id=tmp_path / "c", no_dist=True, extra_files={"x": b"n" * 7777})
    whole = dcp.verify(tmp_path / "c")
    # In pieces that end inside of blocks.
    monkeypatch.setattr("dcp_engine.loader.verify._PIECE_BYTES", 1000)
    assert dcp.verify(tmp_path / "c") == whole
    assert whole.bytes_read > 3 * 1200 + 9000 + 7777


def test_a_file_that_holds_more_than_the_manifest_names(tmp_path: Path) -> None:
    state = {"a": STATE["a"], "b": STATE["b"]}
    dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    path = tmp_path / "c" / "manifest.json"
    text = path.read_text()
    for old, new in (
        ('"names":["a","b"]', '"names":["a"]'),
        ('"shapes":[300,300]', '"shapes":[300]'),
        ('"start":[0,1200]', '"start":[0]'),
        ('"keys":["a","b"]', '"keys":["a"]'),
    ):
        assert old in text
        text = text.replace(old, new)
    body = text[: text.rindex(',"manifest_xxh3_128"')]
    path.write_text(f'{body},"manifest_xxh3_128":"{xxh3_128_hex(body.encode())}"}}\n')
    with pytest.raises(dcp.DamagedCheckpointError, match="at byte 1200, and the manifest nothing"):
        dcp.verify(tmp_path / "c")
    dcp.verify(tmp_path / "c", level="manifest")
