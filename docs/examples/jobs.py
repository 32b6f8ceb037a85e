"""Start a training job with torchrun, watch it, kill it, and tell how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

__all__ = ["Job", "JobFailed"]


class JobFailed(Exception):
    """A job did not do its work; the message ends with its last lines of output."""


class Job:
    """``train.py`` on ``ranks`` processes. Leaving the context kills whatever still runs."""

    def __init__(self, ranks: int, results: Path, arguments: Sequence[str | Path]) -> None:
        self.ranks = ranks
        self.results = results
        self.lines: list[str] = []
        script = Path(__file__).with_name("train.py")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks), str(script)]
        command += [*map(str, arguments), "--results", str(results)]
        # A session of its own, so that Ctrl-C reaches the driver only, which then cleans up.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=_environment(),
            start_new_session=True,
        )
        self._output = threading.Thread(
            target=self._read, args=(self._process.stdout,), daemon=True
        )
        self._output.start()

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._output.is_alive():
            return
        self._process.terminate()  # torchrun hands this on to its ranks, named already or not
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self.kill()

    @property
    def running(self) -> bool:
        """Whether torchrun still runs."""
        return self._process.poll() is None

    def wait(self, deadline: float = 240.0) -> None:
        """Return when every rank has done its work, or raise ``JobFailed``."""
        try:
            status = self._process.wait(deadline)
        except subprocess.TimeoutExpired:
            self.kill()
            raise JobFailed(self._report(f"still running after {deadline:.0f} s")) from None
        self._output.join(deadline)
        finished = [(self.results / f"rank{r}.finished").exists() for r in range(self.ranks)]
        if not all(finished):
            missing = [r for r, done in enumerate(finished) if not done]
            raise JobFailed(self._report(f"exit status {status}, ranks {missing} not finished"))
        if status != 0:
            # torch sometimes aborts in C++ while the interpreter of a rank shuts down. All ranks
            # had said before that their work was done, so this, and only this, is no failure.
            if not any("SIGABRT" in line for line in self.lines):
                raise JobFailed(self._report(f"exit status {status} after all ranks finished"))
            print("    (torch aborted a process at interpreter exit, after all ranks had finished)")

    def kill_worker(self, rank: int) -> bool:
        """SIGKILL to the worker process of that rank; False if it has none."""
        for file in self.results.glob(f"rank{rank}.pid"):
            for child in _children(int(file.read_text() or 0)):
                command = Path(f"/proc/{child}/cmdline")
                with suppress(OSError):
                    if b"dcp_engine worker" in command.read_bytes():
                        os.kill(child, signal.SIGKILL)
                        return True
        return False

    def kill(self, deadline: float = 30.0) -> None:
        """SIGKILL to torchrun and to every rank; return when all of them are gone."""
        # torchrun puts each rank into a session of its own, so its process group is not enough.
        ranks = [int(file.read_text() or 0) for file in self.results.glob("rank*.pid")]
        for pid in [*filter(None, ranks), self._process.pid]:
            for send in (os.killpg, os.kill):
                with suppress(ProcessLookupError):
                    send(pid, signal.SIGKILL)
        self._process.wait(deadline)
        # Every process of the job holds the pipe's other end: its end of file is theirs.
        self._output.join(deadline)
        if self._output.is_alive():
            raise JobFailed(self._report(f"processes live on {deadline:.0f} s after SIGKILL"))

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self.lines.append(line.rstrip())
                if line.startswith(("step", "resumed", "a save failed")):
                    print(f"    {line.rstrip()}", flush=True)

    def _report(self, what: str) -> str:
        return "\n".join([f"the job failed: {what}; its last lines:", *self.lines[-60:]])


def _children(pid: int) -> list[int]:
    """As Linux tells: each thread has the children that it started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def _environment() -> dict[str, str]:
    """The environment without what another distributed job may have left in it."""
    foreign = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in foreign}
    environment.setdefault("OMP_NUM_THREADS", "1")
    # All ranks are on this machine, whose own name need not resolve.
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment
