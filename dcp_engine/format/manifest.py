"""Manifests: what a checkpoint holds, where, and its bytes.

The face of several modules: ``stored`` (the classes), ``manifest_codec`` and ``tensor_section``
(their JSON), ``merge`` (one manifest out of a collective-free save's many). Import from here.
"""

from __future__ import annotations

from dcp_engine.format.manifest_codec import (
    FORMAT_VERSION,
    decode_manifest,
    encode_manifest,
    encode_user_metadata,
)
from dcp_engine.format.merge import merge_manifests
from dcp_engine.format.stored import (
    MAX_BYTES,
    NO_OWNER,
    DataFile,
    DigestFile,
    ExtraFile,
    Manifest,
    StoredChunks,
    StoredObject,
    StoredTensor,
)
from dcp_engine.format.tensor_encoding import TensorSection, encode_tensor_section

__all__ = [
    "FORMAT_VERSION",
    "MAX_BYTES",
    "NO_OWNER",
    "DataFile",
    "DigestFile",
    "ExtraFile",
    "Manifest",
    "StoredChunks",
    "StoredObject",
    "StoredTensor",
    "TensorSection",
    "decode_manifest",
    "encode_manifest",
    "encode_tensor_section",
    "encode_user_metadata",
    "merge_manifests",
]
