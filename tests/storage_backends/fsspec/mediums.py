"""What lies in buckets, looked at without the code under test."""

from __future__ import annotations

from typing import Any

from storage_backends.testing.contracts.medium import Medium


class BucketMedium(Medium):
    """Keys below a prefix, through boto3."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = prefix

    def read(self, name: str) -> bytes:
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=f"{self._prefix}/{name}")
        except self._client.exceptions.NoSuchKey:
            raise FileNotFoundError(name) from None
        return bytes(answer["Body"].read())

    def write(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket=self._bucket, Key=f"{self._prefix}/{name}", Body=data)

    def names(self) -> set[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket)
        keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
        # All of the bucket: what lies beside the prefix would be a mistake, and show.
        return {key.removeprefix(f"{self._prefix}/") for key in keys}

    def unfinished_uploads(self) -> int:
        """Multipart uploads that nobody completed or aborted."""
        answer = self._client.list_multipart_uploads(Bucket=self._bucket)
        return len(answer.get("Uploads", ()))
