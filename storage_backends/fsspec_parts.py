"""How a part of a file reaches its medium: S3's multipart uploads, and files written at offsets.

Belongs here: the sinks of ``PartsFile``. Does not belong here: cutting into parts, threads.

Each call may be repeated after a failure, also after one that in truth was none: parts go by
number or offset, and what completes an upload looks whether it is complete already.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from storage_backends.fsspec_paths import remove_file
from storage_backends.fsspec_puts import put_s3_object

__all__ = ["OffsetSink", "S3Sink", "s3_part_bytes"]

_MIN_PART = 5 << 20
_MAX_PARTS = 9_000
"""S3 takes 10,000; the size of a file is only a hint."""

Lease = Callable[[], AbstractContextManager[Any]]


def s3_part_bytes(size: int | None, part_bytes: int) -> int:
    """Size of the parts of a file of ``size`` bytes: so that there are not too many, and none but
    the last is smaller than S3 takes."""
    return max(part_bytes, _MIN_PART, -(-(size or 0) // _MAX_PARTS))


class S3Sink:
    """A multipart upload through s3fs.

    Until it is completed nothing of the object is seen; an upload that nobody completes stays
    invisible, and is the business of the bucket's life cycle rules.
    """

    def __init__(self, fs: Any, path: str) -> None:
        self._fs = fs
        self._path = path
        bucket, key, _ = fs.split_path(path)
        self._place = {"Bucket": bucket, "Key": key}
        self._lock = threading.Lock()
        self._upload: str | None = None
        self._tags: dict[int, str] = {}

    def put_whole(self, data: bytes) -> None:
        put_s3_object(self._fs, self._path, data)

    def begin(self) -> None:
        answer = self._fs.call_s3("create_multipart_upload", **self._place)
        self._upload = str(answer["UploadId"])

    def send(self, number: int, offset: int, data: bytes) -> None:
        answer = self._fs.call_s3(
            "upload_part",
            PartNumber=number + 1,
            UploadId=self._upload,
            Body=io.BytesIO(data),
            **self._place,
        )
        with self._lock:
            self._tags[number] = str(answer["ETag"])

    def finish(self, size: int) -> None:
        parts = [{"PartNumber": n + 1, "ETag": tag} for n, tag in sorted(self._tags.items())]
        try:
            self._fs.call_s3(
                "complete_multipart_upload",
                UploadId=self._upload,
                MultipartUpload={"Parts": parts},
                **self._place,
            )
        except FileNotFoundError:
            # No such upload: an earlier attempt may have completed it, its answer lost.
            if self._fs.info(self._path)["size"] != size:
                raise
        self._upload = None

    def discard(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            self._fs.call_s3("abort_multipart_upload", UploadId=upload, **self._place)
        remove_file(self._fs, self._path)


class OffsetSink:
    """Parts are written at their offsets of a file that is there from the beginning, each on a
    handle of its own."""

    def __init__(self, lease: Lease, path: str) -> None:
        self._lease = lease
        self._path = path

    def put_whole(self, data: bytes) -> None:
        if data:
            self.send(0, 0, data)

    def begin(self) -> None:
        return None

    def send(self, number: int, offset: int, data: bytes) -> None:
        with self._lease() as fs, fs.open(self._path, "r+b") as file:
            file.seek(offset)
            if not hasattr(file, "set_pipelined"):
                file.write(data)
                return
            # Packets do not wait for each other's answers. Only a write that is not pipelined
            # looks at what was answered to those before it; closing does not.
            view = memoryview(data)
            file.set_pipelined(True)
            file.write(view[:-1])
            file.set_pipelined(False)
            file.write(view[-1:])

    def finish(self, size: int) -> None:
        return None

    def discard(self) -> None:
        with self._lease() as fs:
            remove_file(fs, self._path)
