"""Starting the process of a worker, and burying it.

Belongs here: command line, environment, the first lines of Python that run in it, its exit
status. Does not belong here: what is said to it in between (``parent``).

Not ``multiprocessing``: its children run the parent's main file again, it joins them at exit
without a deadline, and it keeps a resource tracker beside them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing import spawn

from dcp_engine.executors.process.settings import WorkerSettings

__all__ = ["REAP_S", "launch", "reap", "search_path"]

REAP_S = 5.0
"""For a process that has closed its socket, or was sent SIGKILL, to be gone."""

_MAX_THREADS = 4
"""Of OpenMP and MKL: a worker writes and hashes with threads of its own."""

# Before anything of the package can be imported, sys.path has to be the parent's, which comes as
# the first frame (see ``channel``). Signals are set first: one that is meant for the job must not
# meet a worker that is not yet prepared for it. What goes wrong here goes back as a frame without
# a message, and the traceback as its body.
_BOOTSTRAP = """\
import os, sys, _signal
for number in {signals}: _signal.signal(number, _signal.SIG_IGN)
def take(size):
    data = b""
    while len(data) < size:
        part = os.read({fd}, size - len(data))
        if not part: os._exit(1)
        data += part
    return data
try:
    path = take(int.from_bytes(take(12)[:4], "little"))
    sys.path[:] = path.decode("utf-8", "surrogateescape").split("\\0")
    from dcp_engine.executors.process.worker import main
except BaseException:
    import traceback
    text = traceback.format_exc().encode("utf-8", "replace")[-100000:]
    data = bytes(4) + len(text).to_bytes(8, "little") + text
    while data: data = data[os.write({fd}, data):]
    os._exit(1)
main({fd})
"""

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals by which terminals, launchers and schedulers talk to a job: the parent decides what
they mean, and the worker ends when the parent does. ``torchrun`` signals the processes (or process
groups) of the ranks, which the worker is no part of; ``scancel`` and the like signal every process
of a job, and one that a save is waited for must not be gone by then. SIGKILL ends it."""


def launch(settings: WorkerSettings, child_end: socket.socket) -> subprocess.Popen[bytes]:
    """Start the process; it inherits ``child_end``, standard output and standard error.

    It has a session of its own, so that a terminal's Ctrl-C and the signals to the process group
    of a rank do not reach it.

    Raises:
        OSError: there is no such process to be had.
    """
    fd = child_end.fileno()
    signals = tuple(int(number) for number in _IGNORED)
    code = _BOOTSTRAP.format(fd=fd, signals=signals)
    executable = os.fsdecode(spawn.get_executable() or sys.executable)
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return subprocess.Popen(
        # The last words are for people who look at a list of processes.
        [executable, *flags, "-c", code, "dcp_engine worker", settings.name],
        stdin=subprocess.DEVNULL,
        pass_fds=[fd],
        start_new_session=True,
        env=_environment(os.environ, settings),
    )


def reap(process: subprocess.Popen[bytes]) -> str:
    """Wait for a process that is on its way out, and say how it went."""
    try:
        code = process.wait(REAP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    if code >= 0:
        return f"ended with exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}"


def search_path() -> bytes:
    """The parent's ``sys.path``, as the first lines of the worker expect it."""
    entries = [os.path.abspath(entry) if entry == "" else entry for entry in sys.path]
    return "\0".join(map(str, entries)).encode("utf-8", "surrogateescape")


def _environment(environment: Mapping[str, str], settings: WorkerSettings) -> dict[str, str]:
    threads = str(_threads(environment))
    return {
        **environment,
        # A worker has no business with devices, and a context on one would cost memory there.
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        **settings.environment,
    }


def _threads(environment: Mapping[str, str]) -> int:
    """This rank's share of the machine, within bounds; what the parent was given, if that is
    less."""
    ranks = environment.get("LOCAL_WORLD_SIZE", "")
    share = len(os.sched_getaffinity(0)) // (int(ranks) if ranks.isdigit() and int(ranks) else 1)
    given = environment.get("OMP_NUM_THREADS", "")
    limit = int(given) if given.isdigit() and int(given) else _MAX_THREADS
    return max(1, min(share, limit, _MAX_THREADS))
