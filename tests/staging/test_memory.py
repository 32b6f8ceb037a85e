"""How much memory there is, by files in the places where Linux has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcp_engine.errors import StagingError
from dcp_engine.staging.memory import RESERVE, available_memory, require_memory


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 1000 kB\n"


def test_the_kernels_estimate(tmp_path: Path) -> None:
    assert available_memory(system(tmp_path, {"proc/meminfo": MEMINFO})) == 1000 * 1024


def test_nothing_tells(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None


def test_cgroup_2_limits_of_every_level(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/job/task\n",
        "sys/fs/cgroup/job/memory.max": "500000",
        "sys/fs/cgroup/job/memory.current": "400000",
        "sys/fs/cgroup/job/memory.stat": "anon 5\ninactive_file 20000\n",
        "sys/fs/cgroup/job/task/memory.max": "max",
        "sys/fs/cgroup/job/task/memory.current": "300000",
    }
    assert available_memory(system(tmp_path, files)) == 120000


def test_a_container_sees_its_own_group_at_the_mounts_root(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/not/visible/here\n",
        "sys/fs/cgroup/memory.max": "700",
        "sys/fs/cgroup/memory.current": "100",
    }
    assert available_memory(system(tmp_path, files)) == 600


def test_cgroup_1(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu:/x\n4:hugetlb,memory:/job\n0::/\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "9000",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "8000",
        "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "8000",
    }
    assert available_memory(system(tmp_path, files)) == 1500


def test_used_up_is_zero(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "100",
        "sys/fs/cgroup/memory.current": "200",
    }
    assert available_memory(system(tmp_path, files)) == 0


def test_this_machine_has_some() -> None:
    found = available_memory()
    assert found is not None
    assert found > 0


def test_requiring() -> None:
    require_memory(1, available=RESERVE + 1)
    require_memory(0, available=0)
    with pytest.raises(StagingError, match="2 bytes more") as info:
        require_memory(2, available=RESERVE + 1)
    assert info.value.kind == "out_of_memory"
    assert "synchronously" in str(info.value)
