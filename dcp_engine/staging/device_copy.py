"""Copies from devices to the host, beside the work that the devices have queued.

CUDA tensors go over a stream of the stager's own, which waits for what was queued when staging
began and nothing later. Other devices are copied one tensor after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from dcp_engine.storage import Check

__all__ = ["DeviceStreams", "Ready"]

Ready = dict[torch.device, Any]
"""By CUDA device, the event behind which its tensors hold what is to be staged."""


class DeviceStreams:
    """One side stream per device, made when needed and kept."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def mark(self, tensors: Iterable[torch.Tensor]) -> Ready:
        """To be called on the thread that queued the work which ``tensors`` come from."""
        ready: Ready = {}
        for tensor in tensors:
            if tensor.is_cuda and tensor.device not in ready:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(torch.cuda.current_stream(tensor.device))
                ready[tensor.device] = event
        return ready

    def copy(
        self,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        ready: Ready,
        *,
        check: Check,
        copied: Callable[[int], None],
    ) -> None:
        """Copy ``(destination on the host, source on a device)``; returns when all is there.

        The caller keeps the sources alive until then.
        """
        waiting: list[tuple[Any, int]] = []
        try:
            for target, source in pairs:
                check()
                nbytes = target.numel() * target.element_size()
                if not source.is_cuda:
                    target.copy_(source)
                    copied(nbytes)
                    continue
                stream = self._stream(source.device, ready)
                with torch.cuda.stream(stream):
                    target.copy_(source, non_blocking=True)
                    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    done.record(stream)
                waiting.append((done, nbytes))
            for done, nbytes in waiting:
                check()
                done.synchronize()
                copied(nbytes)
        finally:
            # Also after an error: nothing may be written to memory that is given back.
            for device in ready.keys() & self._streams.keys():
                self._streams[device].synchronize()

    def _stream(self, device: torch.device, ready: Ready) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        if device in ready:
            stream.wait_event(ready[device])
        return stream
