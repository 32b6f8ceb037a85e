"""How a worker keeps out of the training's way, and sees that its parent is gone.

Belongs here: what the operating system is asked for. Failing to get it is no failure of the
worker: it is said at debug level.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import select
from pathlib import Path

from dcp_engine.executors.process.settings import MAX_NICE

__all__ = ["be_polite", "name_process", "process_descriptor", "wait_for_end"]

logger = logging.getLogger(__name__)

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273, "s390x": 282}
"""Number of the system call, for which the C library has no function."""
_OF_THIS_PROCESS = 1
_IDLE_CLASS = 3 << 13
_LOWEST_PRIORITY = (2 << 13) | 7
_LOOK_S = 0.5
_AUTOGROUP = Path("/proc/self/autogroup")


def be_polite(nice: int, idle_io: bool) -> None:
    """Give way to the parent on processors and, if asked, on disks. On Linux this holds for the
    calling thread and those that it starts from now on."""
    try:
        os.nice(nice)
    except OSError as error:
        logger.debug("the worker keeps its nice value: %s", error)
    _lower_autogroup(nice)
    if idle_io and not (_set_io_priority(_IDLE_CLASS) or _set_io_priority(_LOWEST_PRIORITY)):
        logger.debug("the worker keeps its priority for input and output")


def _lower_autogroup(nice: int) -> None:
    """Linux may give each session an equal share of the processors, whatever its processes' nice
    values are (sched_autogroup_enabled); then the session has one too (sched(7)). The worker leads
    a session of its own, in which nobody else is slowed."""
    if os.getsid(0) != os.getpid():
        return
    try:
        _AUTOGROUP.write_text(str(min(nice, MAX_NICE)))
    except OSError as error:
        logger.debug("the worker's session keeps its nice value: %s", error)


def _set_io_priority(value: int) -> bool:
    number = _IOPRIO_SET.get(platform.machine())
    if number is None:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(number), _OF_THIS_PROCESS, 0, value) == 0:
        return True
    logger.debug("ioprio_set(%#x): %s", value, os.strerror(ctypes.get_errno()))
    return False


def name_process(name: str) -> None:
    """What ``top`` shows."""
    try:
        Path("/proc/self/comm").write_bytes(name.encode()[:15])
    except OSError as error:
        logger.debug("the worker has no name: %s", error)


def process_descriptor(pid: int) -> int | None:
    """A pidfd, readable when the process has ended; None where the system has none to give. It
    may be that of a stranger if ``pid`` can have ended before the call."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError) as error:
        logger.debug("no pidfd for process %d: %s", pid, error)
        return None


def wait_for_end(parent: int, descriptor: int | None) -> None:
    """Wait until the process ``parent``, which started this one, has ended."""
    if descriptor is not None:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll()
        return
    # Whoever adopts an orphan has another number.
    while os.getppid() == parent:
        select.select([], [], [], _LOOK_S)
