"""What the kernel is told about the pages of an arena: touch or map them ahead, make them huge, pin
them.

Belongs here: ``madvise`` and ``cudaHostRegister`` on an address range. Does not belong here: whose
range it is.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from pathlib import Path

import torch

from dcp_engine.errors import StagingError

__all__ = [
    "advise_huge_pages",
    "can_pin",
    "has_huge_pages",
    "map_present",
    "pin",
    "populate",
    "unpin",
]

logger = logging.getLogger(__name__)

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all devices, not only the current one
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22  # Linux 5.14, as the next one
_MADV_POPULATE_WRITE = 23
_PAGE = os.sysconf("SC_PAGESIZE")
_GRANTED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def populate(memory: torch.Tensor) -> None:
    """Have every page of ``memory`` (contiguous uint8) present and writable; the content stays.

    Releases the GIL. Raises ``StagingError(kind="out_of_memory")`` where the kernel refuses.
    """
    if not memory.numel():
        return
    begin = memory.data_ptr() // _PAGE * _PAGE
    code = _madvise(begin, memory.data_ptr() + memory.numel() - begin, _MADV_POPULATE_WRITE)
    if code == errno.EINVAL:  # an older kernel: write to each page what it holds
        memory[::_PAGE].bitwise_or_(0)
    elif code:
        raise StagingError(
            f"the kernel refused {memory.numel():,} bytes of staging memory: {os.strerror(code)}",
            kind="out_of_memory",
        )


def map_present(memory: torch.Tensor) -> None:
    """Have the pages of ``memory`` (contiguous uint8, all of them in memory) in this process's
    page tables, so that no access faults. Releases the GIL. Nothing where the kernel cannot."""
    if memory.numel():
        begin = memory.data_ptr() // _PAGE * _PAGE
        end = memory.data_ptr() + memory.numel()
        code = _madvise(begin, end - begin, _MADV_POPULATE_READ)
        if code:
            logger.debug("staging memory is not mapped ahead: %s", os.strerror(code))


def has_huge_pages(granted: Path = _GRANTED) -> bool:
    """Whether mapped shared memory may get huge pages, asked for or not, as far as is known."""
    return _setting(granted) not in ("never", "deny")


def advise_huge_pages(memory: torch.Tensor, granted: Path = _GRANTED) -> bool:
    """Ask for huge pages where the system grants them to shared memory on request.

    Returns whether it was asked for. ``always`` and ``within_size`` need no request.
    """
    mode = _setting(granted)
    asked = False
    if mode == "advise" and memory.numel():
        asked = _madvise(memory.data_ptr(), memory.numel(), _MADV_HUGEPAGE) == 0
    logger.debug(
        "huge pages for shared memory: the system's setting is %r; %s",
        mode,
        "asked for" if asked else "not asked for",
    )
    return asked


def can_pin() -> bool:
    """Whether there is a CUDA device to pin memory for."""
    return torch.cuda.is_available()


def pin(memory: torch.Tensor) -> bool:
    """Register ``memory`` with CUDA, so that copies from devices run by themselves.

    Returns whether that worked; a refusal is logged, for copies work without it, only slower.
    """
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE))  # type: ignore[attr-defined,no-untyped-call,unused-ignore]
    if code:
        logger.warning(
            "cudaHostRegister refused %d bytes of staging memory (error %d)", memory.numel(), code
        )
    return code == 0


def unpin(memory: torch.Tensor) -> None:
    """Take back ``pin``."""
    code = int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))  # type: ignore[attr-defined,no-untyped-call,unused-ignore]
    if code:
        logger.warning("cudaHostUnregister failed with error %d", code)


def _setting(granted: Path) -> str:
    try:
        setting = granted.read_text()
    except OSError:
        setting = ""
    return setting.partition("[")[2].partition("]")[0] or "unknown"


def _madvise(address: int, nbytes: int, advice: int) -> int:
    """0, or the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_int(advice))
    return ctypes.get_errno() if result else 0
