"""The manifest in torch's vocabulary."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import pickletools

import pytest
import torch

from dcp_engine.format.manifest import Manifest, decode_manifest
from dcp_engine.format.metadata_view import ManifestMetadata
from dcp_engine.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from tests.format.builders import full_content


@pytest.fixture
def manifest() -> Manifest:
    return decode_manifest(full_content().encode())


def test_entries(manifest: Manifest) -> None:
    metadata = ManifestMetadata.of(manifest, StorageMeta(checkpoint_id="step-1"))
    entries = metadata.state_dict_metadata
    assert list(entries) == [
        "model.weight", "model.bias", "model.tied", "step", "empty", "lr", "big", "rng", "seed",
    ]  # fmt: skip
    assert len(entries) == 9
    weight = entries["model.weight"]
    assert isinstance(weight, TensorStorageMetadata)
    assert weight.properties.dtype is torch.float32
    assert weight.size == torch.Size([4, 6])
    assert weight.chunks == [
        ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 6])),
        ChunkStorageMetadata(torch.Size([2, 0]), torch.Size([2, 6])),
    ]
    assert entries["model.tied"] == weight
    assert entries["lr"] == BytesStorageMetadata()
    assert entries["seed"] == BytesStorageMetadata()
    rng = entries["rng"]
    assert isinstance(rng, TensorStorageMetadata)
    assert rng.size == torch.Size([8])
    assert "rng" in entries
    assert "nope" not in entries
    with pytest.raises(KeyError):
        entries["nope"]
    with pytest.raises(TypeError):
        entries["new"] = BytesStorageMetadata()  # type: ignore[index]
    assert metadata.planner_data["model.bias"] == ("model", "bias")
    assert len(metadata.planner_data) == 4
    assert metadata.storage_meta == StorageMeta(checkpoint_id="step-1")


def test_nothing_is_loaded_before_it_is_looked_at(manifest: Manifest) -> None:
    calls: list[int] = []

    def load() -> Manifest:
        calls.append(1)
        return manifest

    metadata = ManifestMetadata.lazily(load)
    repr(metadata)
    assert not calls
    assert metadata.planner_data["step"] == ("step",)
    assert len(metadata.state_dict_metadata) == 9
    assert calls == [1]


def test_a_failed_load_is_tried_again(manifest: Manifest) -> None:
    results: list[Manifest] = [manifest]

    def load() -> Manifest:
        if len(results) == 1:
            results.append(manifest)
            raise OSError("not now")
        return results[0]

    metadata = ManifestMetadata.lazily(load)
    with pytest.raises(OSError, match="not now"):
        len(metadata.state_dict_metadata)
    assert len(metadata.state_dict_metadata) == 9


def test_it_pickles_as_plain_classes(manifest: Manifest) -> None:
    metadata = ManifestMetadata.of(manifest, StorageMeta(save_id="x"))
    data = pickle.dumps(metadata)
    assert "ManifestMetadata" not in str(list(pickletools.genops(data)))
    for plain in (pickle.loads(data), copy.deepcopy(metadata)):
        assert type(plain) is Metadata
        assert type(plain.state_dict_metadata) is dict
        assert type(plain.planner_data) is dict
        assert plain.state_dict_metadata == dict(metadata.state_dict_metadata)
        assert plain.planner_data == dict(metadata.planner_data)
        assert plain.storage_meta == StorageMeta(save_id="x")


def test_fields_can_be_replaced(manifest: Manifest) -> None:
    metadata = ManifestMetadata.of(manifest)
    changed = dataclasses.replace(metadata, planner_data={"a": 1}, storage_data=[2])
    assert isinstance(changed, Metadata)
    assert changed.planner_data == {"a": 1}
    assert len(changed.state_dict_metadata) == 9
    assert pickle.loads(pickle.dumps(changed)).storage_data == [2]
