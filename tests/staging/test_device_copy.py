"""Copies from devices; what needs a CUDA device runs only where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dcp_engine.staging.arena_stager import ArenaStager, Sources
from dcp_engine.staging.device_copy import DeviceStreams
from dcp_engine.staging.stagers import DefaultStager, StagingOptions
from tests.staging.states import numbered

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_devices_without_streams_are_copied_one_by_one() -> None:
    streams = DeviceStreams()
    pairs = [(torch.zeros(4), numbered(4)), (torch.zeros(2), numbered(2))]
    assert streams.mark([source for _, source in pairs]) == {}
    looks: list[int] = []
    done: list[int] = []
    streams.copy(pairs, {}, check=lambda: looks.append(0), copied=done.append)
    assert all(torch.equal(target, source) for target, source in pairs)
    assert (len(looks), done) == (2, [16, 8])


@pytest.fixture(params=[False, True], ids=["pageable", "pinned"])
def arenas(request: pytest.FixtureRequest) -> Iterator[ArenaStager]:
    with ArenaStager(threads=2, pin=request.param) as stager:
        yield stager


@needs_cuda
@pytest.mark.parametrize("background", [False, True])
def test_cuda_tensors(arenas: ArenaStager, background: bool) -> None:
    device = torch.device("cuda")
    big = numbered(3000, 3000).to(device)
    tensors = [big, big.T, big[::2, 5], numbered(3).to(device), torch.tensor(1.5, device=device)]
    tensors += [numbered(10), numbered(8, dtype=torch.bfloat16).to(device)]
    expected = [tensor.cpu() for tensor in tensors]
    staging = arenas.begin(
        Sources(tensors=tensors, names=[str(i) for i in range(len(tensors))]),
        background=background,
    )
    staging.wait()
    for tensor in tensors:
        tensor.zero_()
    for staged, value in zip(staging.tensors(), expected, strict=True):
        assert torch.equal(staged, value)
    assert staging.bytes_done == staging.bytes_total


@needs_cuda
def test_work_queued_before_is_waited_for(arenas: ArenaStager) -> None:
    matrix = torch.full((4000, 4000), 1.0 / 4000, device="cuda")
    value = torch.ones(4000, 4000, device="cuda")
    for _ in range(20):
        value = matrix @ value
    staging = arenas.begin(Sources(tensors=[value], names=["v"]))
    value.zero_()
    torch.testing.assert_close(staging.tensors()[0], torch.ones(4000, 4000))


@needs_cuda
def test_memory_is_pinned_if_asked() -> None:
    for pinned in (False, True):
        with DefaultStager(StagingOptions(use_pinned_memory=pinned)) as stager:
            staged = stager.begin({"w": numbered(5).cuda()})
            assert staged.staging.arena.pinned is pinned
            assert staged.state_dict["w"].is_pinned() is pinned
            staged.release()
