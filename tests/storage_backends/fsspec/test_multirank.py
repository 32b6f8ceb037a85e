"""Real gloo ranks that save to a server together, and load on another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import dcp_engine as dcp
from tests.multirank import states
from tests.servers.s3 import S3Server
from tests.servers.sftp import SftpServer

pytestmark = pytest.mark.multirank


def save_twice(url: str) -> None:
    """The second save takes the place of the first one, whose data goes."""
    world_size = dist.get_world_size()
    for _ in range(2):
        dcp.save(states.state(world_size, filled=True, own=False), checkpoint_id=url, timeout=60)


def load(url: str, turned: bool) -> list[str]:
    world_size = dist.get_world_size()
    state: dict[str, Any] = states.state(world_size, filled=False, turned=turned, own=False)
    dcp.load(state, checkpoint_id=url, timeout=60)
    return states.differences(state, world_size, own=False)


def save_and_fail(url: str) -> tuple[str, str]:
    """Rank 1 does not get its file through."""
    try:
        dcp.save(
            states.state(dist.get_world_size(), filled=True, own=False),
            storage_writer=dcp.FsspecWriter(url, retries=0),
            timeout=60,
        )
    except dcp.CheckpointException as error:
        return error.kind, ",".join(map(str, error.failures))
    return "saved", ""


def round_trip(ranks: Any, url: str) -> None:
    ranks.run(2, save_twice, url)
    assert ranks.run(2, load, url, False) == [[], []]
    assert ranks.run(1, load, url, True) == [[]]


def test_s3(ranks: Any, s3: S3Server) -> None:
    bucket = s3.new_bucket()
    round_trip(ranks, s3.url(f"{bucket}/run"))
    keys = s3.client().list_objects_v2(Bucket=bucket)["Contents"]
    assert len({item["Key"].split("/")[1] for item in keys}) == 2, "the replaced data is gone"


def test_sftp(ranks: Any, sftp: SftpServer, tmp_path: Path) -> None:
    round_trip(ranks, sftp.url(tmp_path / "team" / "run"))
    assert len(list((tmp_path / "team" / "run").iterdir())) == 2


def test_one_rank_lists_for_all(ranks: Any, s3: S3Server) -> None:
    """Stores throttle a job whose ranks all list."""
    url = s3.url(f"{s3.new_bucket()}/run")
    ranks.run(2, save_twice, url)
    s3.tell()
    ranks.run(2, load, url, False)
    assert [entry for entry in s3.log() if "list-type" in entry["query"]] == []


def test_one_rank_whose_upload_fails(ranks: Any, s3: S3Server) -> None:
    url = s3.url(f"{s3.new_bucket()}/run")
    ranks.run(2, save_twice, url)
    s3.tell({"match": ["PUT", "rank00001-00"], "action": "fail", "times": 1000})
    assert ranks.run(2, save_and_fail, url) == [("io_error", "1")] * 2
    s3.tell()
    assert ranks.run(2, load, url, False) == [[], []]
