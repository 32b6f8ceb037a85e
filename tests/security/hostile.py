"""Checkpoints that somebody hostile made: saved well, then changed, their digests right again.

Belongs here: making them, and watching that nothing outside is touched. Does not belong here: what
must come of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dcp_engine.format.digest import (
    block_digests,
    decode_digests,
    digest_value,
    encode_digests,
    xxh3_128_hex,
)
from tests.end_to_end.checkpoints import data_of, forge, snapshot

DATA = "rank00000-00.safetensors"
DIGESTS = "rank00000.digests"


@contextmanager
def nothing_changes(root: Path) -> Iterator[None]:
    """Nothing below ``root`` is made, changed or removed."""
    before = snapshot(root)
    yield
    assert snapshot(root) == before


def sign_data(root: Path) -> None:
    """Make all digests right for the data file as it is now: of its header, its blocks, and of the
    digest file in the manifest."""
    data = (data_of(root) / DATA).read_bytes()
    path = data_of(root) / DIGESTS
    table = decode_digests(path.read_bytes())
    begin = _data_start(root)
    places = zip(table.start.tolist(), table.nbytes.tolist(), strict=True)
    content = encode_digests(
        block_size=table.block_size,
        header_digests=[(0, digest_value(data[:begin]))],
        file=table.file,
        start=table.start,
        nbytes=table.nbytes,
        blocks=[block_digests(data[begin + s : begin + s + n], table.block_size)
                for s, n in places],
    )  # fmt: skip
    path.write_bytes(content)

    def change(fields: dict[str, Any]) -> None:
        fields["digest_files"]["size"] = [len(content)]
        fields["digest_files"]["xxh3_128"] = [xxh3_128_hex(content)]
        fields["data_files"]["size"] = [len(data)]

    forge(root, change)


def _data_start(root: Path) -> int:
    column = json.loads((root / "manifest.json").read_bytes())["data_files"]["data_start"]
    return int(column[0] if isinstance(column, list) else column)


def put_header(root: Path, header: bytes, *, length: int | None = None) -> None:
    """Replace the data file's header, in its place and padded; ``length`` is what it claims."""
    path = data_of(root) / DATA
    data, begin = path.read_bytes(), _data_start(root)
    assert len(header) <= begin - 8
    claimed = begin - 8 if length is None else length
    head = claimed.to_bytes(8, "little") + header.ljust(begin - 8)
    path.write_bytes(head + data[begin:])
    sign_data(root)


def header_of(root: Path) -> dict[str, Any]:
    """The data file's header."""
    data = (data_of(root) / DATA).read_bytes()
    header: dict[str, Any] = json.loads(data[8 : _data_start(root)])
    return header
