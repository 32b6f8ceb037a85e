"""Manifests of a collective-free save: united when complete, else the ranks are named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dcp_engine.errors import CheckpointError, DamagedCheckpointError, NotFoundError
from dcp_engine.format.manifest import Manifest, StoredObject, decode_manifest, merge_manifests
from dcp_engine.format.nesting import encode_nesting
from tests.format.builders import Content, Row, files


def content(rank: int, world_size: int = 3) -> Content:
    """Rank ``rank``'s part of: ``w`` sharded by rows, ``tied`` with it, a value for each rank."""
    chunk = ((2 * rank, 0), (2, 4), rank % 2, 64 * (rank // 2))
    path = ("w",) if rank else ("first",)
    return Content(
        rows=[
            Row(name="w", shape=(2 * world_size, 4), chunks=[chunk]),
            Row(name="tied", shape=(2 * world_size, 4), alias=0),
            Row(
                name="rng",
                shape=(4,),
                chunks=[((0,), (4,), 1, 200)],
                dtype=torch.uint8,
                owner=rank,
            ),
        ],
        objects=[
            StoredObject(name="seed", pickled=False, inline=bytes([1, rank]), owner=rank),
            StoredObject(name=f"only{rank}", pickled=False, file=1, start=204, nbytes=9),
        ],
        data_files=files(300, 300, rank=rank),
        nesting=encode_nesting({path[0]: path}, {}),
        world_size=world_size,
        token="run-7/0/12",
        rank=rank,
        time=1000.0 + rank,
        user_metadata={"rank": rank},
    )


def decoded(contents: list[Content]) -> list[Manifest]:
    return [decode_manifest(c.encode()) for c in contents]


def parts(world_size: int = 3) -> list[Content]:
    return [content(rank, world_size) for rank in range(world_size)]


def test_chunks_are_united() -> None:
    manifest = merge_manifests(decoded(parts())[::-1])
    manifest.validate()
    assert (manifest.rank, manifest.token, manifest.world_size) == (None, "run-7/0/12", 3)
    assert manifest.time == 1002.0
    assert manifest.user_metadata == {"rank": 0}
    assert [f.name for f in manifest.data_files] == [
        f"rank0000{rank}-0{number}.safetensors" for rank in range(3) for number in range(2)
    ]
    chunks = manifest.tensors["w"].chunks
    assert chunks.offsets.tolist() == [[0, 0], [2, 0], [4, 0]]
    assert [manifest.data_files[i].name for i in chunks.file.tolist()] == [
        "rank00000-00.safetensors", "rank00001-01.safetensors", "rank00002-00.safetensors",
    ]  # fmt: skip
    assert chunks.start.tolist() == [0, 0, 64]
    assert chunks.nbytes.tolist() == [32, 32, 32]
    assert manifest.tensors["tied"].alias_of == "w"
    assert manifest.tensors["tied"].chunks.start.tolist() == chunks.start.tolist()
    assert list(manifest.per_rank_tensors["rng"]) == [0, 1, 2]
    assert manifest.per_rank_tensors["rng"][2].chunks.file.tolist() == [5]
    assert manifest.per_rank_objects["seed"][1].inline == b"\x01\x01"
    assert manifest.objects["only1"].file == 3
    assert [f.rank for f in manifest.digest_files] == [0, 1, 2]
    assert list(manifest.nesting.paths()) == ["first", "w"]


def test_one_rank_alone_does_not_tile() -> None:
    (first, *_) = decoded(parts())
    assert first.tensors["w"].chunks.offsets.tolist() == [[0, 0]]
    first.validate()


def test_missing_ranks_are_named() -> None:
    manifests = decoded(parts(5))
    with pytest.raises(NotFoundError, match=r"ranks 1, 4 of 5 have no manifest") as caught:
        merge_manifests([manifests[0], manifests[2], manifests[3]])
    assert caught.value.kind == "incomplete"
    with pytest.raises(NotFoundError) as caught:
        merge_manifests([])
    assert caught.value.kind == "incomplete"


def test_many_missing_ranks_are_counted() -> None:
    only = decode_manifest(replace(content(0), world_size=1000).encode())
    with pytest.raises(NotFoundError, match=r"and 979 more") as caught:
        merge_manifests([only])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("change", [{"token": "other"}, {"save_id": "f" * 32}])
def test_ranks_with_another_token_are_named(change: dict[str, str]) -> None:
    changed = parts()
    changed[1] = replace(changed[1], **change)  # type: ignore[arg-type]
    with pytest.raises(NotFoundError, match=r"ranks 1 carry another token") as caught:
        merge_manifests(decoded(changed))
    assert caught.value.kind == "incomplete"


def invalid(contents: list[Content]) -> str:
    with pytest.raises(DamagedCheckpointError) as caught:
        merged = merge_manifests(decoded(contents))
        merged.validate()
        merged.nesting.paths()
    assert caught.value.kind == "manifest_invalid"
    return str(caught.value)


def test_ranks_that_contradict_each_other_are_named() -> None:
    changed = parts()
    changed[2] = replace(changed[2], world_size=4)
    with pytest.raises(NotFoundError, match=r"ranks 3 of 4"):
        merge_manifests(decoded(changed))
    changed[2] = replace(content(2), block_size=512)
    assert "ranks 0 and 2 differ" in invalid(changed)
    changed[2] = replace(content(2), rows=[Row(name="w", shape=(7, 4))])
    assert "ranks 0 and 2 differ in dtype or shape" in invalid(changed)
    rows = [Row(name="w", shape=(6, 4), dtype=torch.float16)]
    changed[2] = replace(content(2), rows=rows)
    assert "dtype or shape" in invalid(changed)
    changed[2] = replace(content(2), nesting=encode_nesting({"w": ("x", "w")}, {}))
    assert "'w' differently" in invalid(changed)
    changed[2] = content(2)
    objects = [StoredObject(name="x", pickled=False, inline=b"\x01N", owner=1)] * 1
    changed[1] = replace(content(1), objects=objects)
    changed[2] = replace(content(2), objects=objects)
    assert "two manifests hold the value of rank 1" in invalid(changed)
    changed = parts()
    objects = [StoredObject(name="w", pickled=False, inline=b"\x01N")]
    changed[2] = replace(content(2), rows=[], objects=objects)
    assert "disagree whether it is a tensor" in invalid(changed)


def test_of_shared_objects_the_lowest_ranks_counts() -> None:
    changed = parts()
    for rank in (1, 2):
        mine = StoredObject(name="step", pickled=False, inline=bytes([1, rank]))
        changed[rank] = replace(changed[rank], objects=[*changed[rank].objects, mine])
    large = StoredObject(name="only2", pickled=False, file=0, start=200, nbytes=9)
    changed[1] = replace(changed[1], objects=[*changed[1].objects, large])
    manifest = merge_manifests(decoded(changed))
    assert manifest.objects["step"].inline == b"\x01\x01"
    assert (manifest.objects["only2"].file, manifest.objects["only2"].start) == (2, 200)
    manifest.validate()


@pytest.mark.parametrize("ndim", [0, 2])
def test_a_box_that_several_ranks_wrote_counts_once(ndim: int) -> None:
    changed = parts()
    shape = (4, 3)[:ndim]
    for rank in range(3):
        chunks = [((0, 0)[:ndim], (2, 3)[:ndim], 0, 100), ((2, 0)[:ndim], (2, 3)[:ndim], 1, 100)]
        mine = chunks[: 1 if ndim == 0 else 2] if rank else chunks[:1]
        changed[rank].rows = [*changed[rank].rows, Row(name="row", shape=shape, chunks=mine)]
    manifest = merge_manifests(decoded(changed))
    manifest.validate()
    chunks = manifest.tensors["row"].chunks
    assert chunks.file.tolist() == ([0, 3] if ndim else [0])
    assert chunks.offsets.tolist() == ([[0, 0], [2, 0]] if ndim else [[]])


def test_boxes_that_cross_are_still_refused() -> None:
    changed = parts()
    changed[1].rows = [
        Row(name="w", shape=(6, 4), chunks=[((1, 0), (2, 4), 0, 0)]),
        *changed[1].rows[1:],
    ]
    with pytest.raises(DamagedCheckpointError) as caught:
        merge_manifests(decoded(changed)).validate()
    assert caught.value.kind == "chunks_overlap"


def test_a_rank_without_its_chunk_leaves_a_gap() -> None:
    changed = parts()
    changed[1] = replace(changed[1], rows=[Row(name="w", shape=(6, 4))])
    assert "cover 16 of 24" in invalid(changed)


def test_a_rank_twice() -> None:
    manifests = decoded(parts())
    with pytest.raises(DamagedCheckpointError, match="rank 1 has two"):
        merge_manifests([*manifests, decode_manifest(content(1).encode())])


def test_an_ordinary_manifest_is_not_one_of_several() -> None:
    with pytest.raises(DamagedCheckpointError, match="not one rank's"):
        merge_manifests([decode_manifest(Content().encode())])


def test_a_rank_manifest_names_files_of_its_rank_only() -> None:
    with pytest.raises(DamagedCheckpointError, match="another rank"):
        decode_manifest(replace(content(0), data_files=files(300, 300, rank=1)).encode())


def test_ranks_that_hold_nothing_do_not_untie() -> None:
    contents = parts(2)
    shape = (4, 4)
    contents[0] = replace(
        contents[0],
        rows=[
            Row(name="w", shape=shape, chunks=[((0, 0), shape, 0, 0)]),
            Row(name="tied", shape=shape, alias=0),
        ],
    )
    contents[1] = replace(
        contents[1], rows=[Row(name="w", shape=shape), Row(name="tied", shape=shape)]
    )
    manifest = merge_manifests(decoded(contents))
    assert manifest.tensors["tied"].alias_of == "w"
    manifest.validate()


def test_tied_on_one_rank_only() -> None:
    contents = parts(2)
    contents[1] = replace(
        contents[1],
        rows=[
            Row(name="w", shape=(4, 4), chunks=[((2, 0), (2, 4), 0, 0)]),
            Row(name="tied", shape=(4, 4), chunks=[((2, 0), (2, 4), 0, 32)]),
        ],
    )
    manifest = merge_manifests(decoded(contents))
    tied = manifest.tensors["tied"]
    assert tied.alias_of is None
    assert tied.chunks.offsets.tolist() == [[0, 0], [2, 0]]
    assert tied.chunks.start.tolist() == [0, 32]
    manifest.validate()


def test_a_merged_manifest_cannot_be_merged_again() -> None:
    merged = merge_manifests(decoded(parts()))
    with pytest.raises(CheckpointError):
        merge_manifests([merged])
