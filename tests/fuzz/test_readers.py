"""Every reader of foreign bytes, fed with mutations of what its encoder writes.

For each input the reader must return something that can be used, or raise a ``CheckpointError``;
nothing else may come out, in memory in proportion to the input, and without taking long. A hundred
inputs a reader in a normal run; ``DCP_FUZZ_EXAMPLES`` (by default 20,000) in the long form, which
``-m torture`` selects. Different ones each time there, and a failure prints what it was.
"""

from __future__ import annotations

import os
import time
import tracemalloc
import warnings

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dcp_engine.errors import KINDS, CheckpointError
from tests.fuzz.targets import TARGETS, Target

EXAMPLES = 100
LONG = int(os.environ.get("DCP_FUZZ_EXAMPLES", "20000"))
FREE_BYTES = 8 << 20
"""What a reader may take whatever the size of its input: the budget of a nesting's names, zlib's
windows, error texts."""
BYTES_PER_BYTE = 64
SECONDS = 20.0
"""Of processor time for one input: a hundred times what the slowest takes."""


def fuzz(target: Target, examples: int, *, fixed: bool) -> dict[str, int]:
    """Run ``target`` so often. Returns how often each kind came out; "" for none."""
    outcomes: dict[str, int] = {}

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=fixed,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        size, run = target(data)
        kind = ""
        tracemalloc.start()
        begin = time.process_time()
        try:
            run()
        except CheckpointError as error:
            kind = error.kind
            assert str(error)
        finally:
            seconds = time.process_time() - begin
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert seconds < SECONDS
        assert peak <= FREE_BYTES + BYTES_PER_BYTE * size
        assert not kind or kind in KINDS
        outcomes[kind] = outcomes.get(kind, 0) + 1

    with warnings.catch_warnings():
        # torch tells of device types and archives that are no longer used.
        warnings.filterwarnings("ignore", category=UserWarning, module="torch|dcp_engine")
        one()
    return outcomes


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_returns_or_refuses(name: str) -> None:
    outcomes = fuzz(TARGETS[name], EXAMPLES, fixed=True)
    # Mutations that all pass, or of which none does, would test one path only.
    assert sum(outcomes.values()) - outcomes.get("", 0) >= EXAMPLES // 20, outcomes


@pytest.mark.torture
@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_returns_or_refuses_at_length(name: str) -> None:
    print(f"\n{name}: {sorted(fuzz(TARGETS[name], LONG, fixed=False).items())}")
