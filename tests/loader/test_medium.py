"""When ranks hand on what they read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcp_engine.loader.medium import MAX_RANKS, RankPlace, file_system_type, worth_handing_on

LOCAL = RankPlace(host="a", is_local=True)
ELSEWHERE = RankPlace(host="b", is_local=True)
NETWORK = RankPlace(host="a", is_local=False)

MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:25 / /mnt rw shared:2 - tmpfs tmpfs rw
31 30 0:26 / /mnt/data rw shared:3 - nfs4 server:/export rw,vers=4.2
32 30 0:27 / /mnt/with\\040blank rw - fuse.sshfs host:/ rw
33 22 0:28 / /twice rw - ext4 /dev/vdb rw
34 22 0:29 / /twice rw - lustre mgs:/fs rw
nonsense
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/x", "ext4"),
        ("/", "ext4"),
        ("/mnt", "tmpfs"),
        ("/mnt/database/x", "tmpfs"),
        ("/mnt/data", "nfs4"),
        ("/mnt/data/step-1/x", "nfs4"),
        ("/mnt/with blank/x", "fuse.sshfs"),
        ("/twice/x", "lustre"),
    ],
)
def test_the_innermost_and_last_mount_counts(path: str, kind: str) -> None:
    assert file_system_type(path, MOUNTS) == kind


def test_an_unknown_mount_has_no_type() -> None:
    assert file_system_type("/x", "") == ""


def test_this_machine_says_what_it_has(tmp_path: Path) -> None:
    assert file_system_type(str(tmp_path)) != ""
    assert file_system_type("/proc/self/stat") == "proc"


@pytest.mark.parametrize(
    ("places", "handing_on"),
    [
        ([LOCAL], False),
        ([NETWORK], False),
        ([LOCAL, LOCAL], False),
        ([LOCAL, ELSEWHERE], True),
        ([NETWORK, NETWORK], True),
        ([LOCAL, NETWORK], True),
        ([NETWORK] * MAX_RANKS, True),
        ([NETWORK] * (MAX_RANKS + 1), False),
    ],
)
def test_the_rule(places: list[RankPlace], handing_on: bool) -> None:
    assert worth_handing_on(places) is handing_on
