"""Makes the golden files of format version 1: ``python tests/golden/regenerate.py``.

They pin the bytes of every part of the format: one small checkpoint of two ranks, one rank's
manifest of a collective-free save, and the tagged encoding of one value of each type. Only a
change of the format may change them; it is then written into docs/format.md and the changelog.
Everything here is put together by hand from the format layer, without the engine's writer.
"""

from __future__ import annotations

import collections
import datetime
import json
import pathlib
import sys
import uuid

import numpy as np
import torch

HERE = pathlib.Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))

from dcp_engine.format.digest import (  # noqa: E402
    block_digests,
    digest_value,
    encode_digests,
    xxh3_128_hex,
)
from dcp_engine.format.dtypes import DTYPES, code_of, stored_shape  # noqa: E402
from dcp_engine.format.manifest import (  # noqa: E402
    NO_OWNER,
    DataFile,
    DigestFile,
    ExtraFile,
    StoredObject,
    encode_manifest,
    encode_tensor_section,
)
from dcp_engine.format.names import OwnerRecord, encode_owner  # noqa: E402
from dcp_engine.format.nesting import encode_nesting  # noqa: E402
from dcp_engine.format.object_codec import encode_object  # noqa: E402
from dcp_engine.format.shard_file import HeaderEntry, encode_header, entry_name  # noqa: E402

SAVE_ID = uuid.UUID(int=0x00112233445566778899AABBCCDDEEFF).hex
TIME = 1763683200.25
BLOCK_SIZE = 512

VALUES: dict[str, object] = {
    "none": None,
    "bools": [True, False],
    "ints": [0, -1, 255, 1 << 100],
    "packed ints": list(range(20)),
    "packed floats": tuple(i / 4 for i in range(20)),
    "floats": [0.5, -0.0, float("inf"), float("nan")],
    "complex": 1 - 2j,
    "text": "größe",
    "bytes": b"\x00\xff",
    "bytearray": bytearray(b"abc"),
    "tuple": (1, "a", ()),
    "set": {"b", "a", 1},
    "frozenset": frozenset({2, 1}),
    "dict": {"z": 1, "a": {2: None}},
    "OrderedDict": collections.OrderedDict(b=1, a=2),
    "torch": [torch.Size([2, 3]), torch.bfloat16, torch.device("cuda", 1)],
    "numpy scalars": [np.float32(1.5), np.bool_(True), np.datetime64("2026-11-21")],
    "numpy array": np.arange(6, dtype=np.int16).reshape(2, 3),
    "dates": [
        datetime.datetime(2026, 11, 21, 1, 2, 3, 4, tzinfo=datetime.UTC),
        datetime.date(2026, 11, 21),
        datetime.time(23, 59),
        datetime.timedelta(days=-1, microseconds=7),
    ],
    "range": range(1, 10, 3),
    "paths": [pathlib.PurePosixPath("/a/b"), pathlib.PureWindowsPath("c:/d")],
    "enum": uuid.SafeUUID.safe,
}


def tensors() -> dict[str, torch.Tensor]:
    """The whole tensors of the golden checkpoint."""
    return {
        "model.weight": torch.arange(8 * 50, dtype=torch.float32).reshape(8, 50),
        "model.bias": torch.arange(50).to(torch.bfloat16),
        "phase": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128),
        "step": torch.tensor(1234, dtype=torch.int64),
        "rng/0": torch.arange(5, dtype=torch.uint8),
        "rng/1": torch.arange(7, dtype=torch.uint8),
    }


class _Rank:
    """Files of one rank, put together."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.data = b""
        self.entries: list[HeaderEntry] = []
        self.places: list[tuple[int, int]] = []

    def add(self, fqn: str, offsets: tuple[int, ...] | None, data: torch.Tensor | bytes) -> int:
        """Append a chunk; returns where it begins."""
        start = len(self.data)
        if isinstance(data, bytes):
            code, shape = code_of(torch.uint8), (len(data),)
        else:
            code, shape = code_of(data.dtype), tuple(data.shape)
            data = data.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        self.data += data
        name = entry_name(fqn, offsets, {entry.name for entry in self.entries})
        self.entries.append(HeaderEntry(name, code, shape, start, len(self.data)))
        self.places.append((start, len(data)))
        return start

    def files(self) -> tuple[bytes, bytes]:
        """Data file and digest file."""
        header = encode_header(self.entries, {"format": "pt"})
        digests = encode_digests(
            block_size=BLOCK_SIZE,
            header_digests=[(0, digest_value(header))],
            file=np.zeros(len(self.places), np.int32),
            start=np.array([start for start, _ in self.places], np.int64),
            nbytes=np.array([nbytes for _, nbytes in self.places], np.int64),
            blocks=[
                block_digests(self.data[start : start + nbytes], BLOCK_SIZE)
                for start, nbytes in self.places
            ],
        )
        return header + self.data, digests


def checkpoint() -> dict[str, bytes]:
    """File name to content: a checkpoint of two ranks with one of everything."""
    values = tensors()
    ranks = [_Rank(0), _Rank(1)]
    phase = ranks[0].add("phase", None, values["phase"])
    step = ranks[1].add("step", None, values["step"])
    weight = [
        rank.add("model.weight", (4 * rank.rank, 0), values["model.weight"][4 * rank.rank :][:4])
        for rank in ranks
    ]
    bias = ranks[0].add("model.bias", None, values["model.bias"])
    rng = [rank.add("rng", None, values[f"rng/{rank.rank}"]) for rank in ranks]
    big = encode_object(list(range(100)), fqn="big").data
    big_start = ranks[1].add("big", None, big)
    names = ["model.weight", "model.bias", "model.tied", "phase", "step", "rng", "rng"]
    dtypes = ["float32", "bfloat16", "float32", "complex128", "int64", "uint8", "uint8"]
    chunks = [  # tensor, offsets, sizes, file, start
        (0, (0, 0), (4, 50), 0, weight[0]),
        (0, (4, 0), (4, 50), 1, weight[1]),
        (1, (0, 0), (50, 1), 0, bias),
        (3, (0, 0), (2, 1), 0, phase),
        (4, (0, 0), (1, 1), 1, step),
        (5, (0, 0), (5, 1), 0, rng[0]),
        (6, (0, 0), (7, 1), 1, rng[1]),
    ]
    extra = b'{"hidden": 50}\n'
    made = [rank.files() for rank in ranks]
    manifest = encode_manifest(
        save_id=SAVE_ID,
        world_size=2,
        time=TIME,
        writers={"dcp_engine": "golden", "torch": "2.13.0"},
        user_metadata={"run": "golden", "epochs": [1, 2.5, None]},
        block_size=BLOCK_SIZE,
        data_files=[
            DataFile(rank=i, number=0, data_start=len(data) - len(r.data), size=len(data))
            for i, ((data, _), r) in enumerate(zip(made, ranks, strict=True))
        ],
        digest_files=[
            DigestFile(rank=i, size=len(digests), xxh3_128=xxh3_128_hex(digests))
            for i, (_, digests) in enumerate(made)
        ],
        extra_files=[
            ExtraFile(name="extra/config.json", size=len(extra), xxh3_128=xxh3_128_hex(extra))
        ],
        tensors=encode_tensor_section(
            names=names,
            dtypes=np.array([code_of(getattr(torch, name)) for name in dtypes], np.uint8),
            ndims=np.array([2, 1, 2, 1, 0, 1, 1], np.uint8),
            shapes=np.array([(8, 50), (50, 1), (8, 50), (2, 1), (1, 1), (5, 1), (7, 1)], np.int64),
            owners=np.array([NO_OWNER] * 5 + [0, 1], np.int32),
            aliases=np.array([-1, -1, 0, -1, -1, -1, -1], np.int32),
            chunk_tensor=np.array([c[0] for c in chunks], np.int32),
            chunk_offsets=np.array([c[1] for c in chunks], np.int64),
            chunk_sizes=np.array([c[2] for c in chunks], np.int64),
            chunk_file=np.array([c[3] for c in chunks], np.int32),
            chunk_start=np.array([c[4] for c in chunks], np.int64),
        ),
        objects=[
            StoredObject(name="lr", pickled=False, inline=encode_object(0.1, fqn="lr").data),
            StoredObject(name="big", pickled=False, file=1, start=big_start, nbytes=len(big)),
            *(
                StoredObject(
                    name="seed", pickled=False, inline=encode_object(i, fqn="seed").data, owner=i
                )
                for i in range(2)
            ),
        ],
        nesting=encode_nesting(
            {
                "model.weight": ("model", "weight"),
                "model.bias": ("model", "bias"),
                "model.tied": ("model", "tied"),
                **{name: (name,) for name in ("phase", "step", "rng", "lr", "big", "seed")},
            },
            {("model",): "dict"},
        ),
    )
    directory = f"data-{SAVE_ID}"
    owner = OwnerRecord(
        run_id="golden", restart_count=0, group="default", host="host", boot_id="boot", pid=1
    )
    result = {
        "manifest.json": manifest,
        f"{directory}/owner.json": encode_owner(owner),
        f"{directory}/extra/config.json": extra,
    }
    for i, (data, digests) in enumerate(made):
        result[f"{directory}/rank0000{i}-00.safetensors"] = data
        result[f"{directory}/rank0000{i}.digests"] = digests
    return result


def rank_manifest() -> bytes:
    """One rank's manifest of a collective-free save."""
    return encode_manifest(
        save_id=SAVE_ID,
        world_size=2,
        time=TIME,
        writers={"dcp_engine": "golden"},
        user_metadata={},
        block_size=BLOCK_SIZE,
        data_files=[DataFile(rank=1, number=0, data_start=4096, size=4128)],
        digest_files=[DigestFile(rank=1, size=88, xxh3_128="00" * 16)],
        extra_files=[],
        tensors=encode_tensor_section(
            names=["w"],
            dtypes=np.array([code_of(torch.float32)], np.uint8),
            ndims=np.array([2], np.uint8),
            shapes=np.array([[4, 4]], np.int64),
            owners=np.array([NO_OWNER], np.int32),
            aliases=np.array([-1], np.int32),
            chunk_tensor=np.array([0], np.int32),
            chunk_offsets=np.array([[2, 0]], np.int64),
            chunk_sizes=np.array([[2, 4]], np.int64),
            chunk_file=np.array([0], np.int32),
            chunk_start=np.array([0], np.int64),
        ),
        objects=[],
        nesting=encode_nesting({"w": ("w",)}, {}),
        token="golden/0/1",
        rank=1,
    )


def all_dtypes_header() -> bytes:
    """The header of a file with a (2, 4) tensor of every dtype."""
    entries, position = [], 0
    for entry in sorted(DTYPES.values(), key=lambda e: (-e.itemsize, e.code)):
        end = position + 8 * entry.itemsize
        entries.append(HeaderEntry(entry.name, entry.code, (2, 4), position, end))
        position = end
    return encode_header(entries, {"format": "pt"})


def build() -> dict[str, bytes]:
    """Every golden file by name, relative to this directory."""
    objects = {name: encode_object(value, fqn=name).data.hex() for name, value in VALUES.items()}
    dtypes = [[e.code, e.name, *stored_shape(e, (2, 4))] for e in DTYPES.values()]
    return {
        **{f"checkpoint/{name}": data for name, data in checkpoint().items()},
        "manifest-rank00001.json": rank_manifest(),
        "all-dtypes.header": all_dtypes_header(),
        "dtypes.json": json.dumps(dtypes, indent=0).encode() + b"\n",
        "objects.json": json.dumps(objects, indent=0, ensure_ascii=False).encode() + b"\n",
    }


if __name__ == "__main__":
    for name, data in build().items():
        path = HERE / "v1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        print(f"{len(data):8} {name}")
