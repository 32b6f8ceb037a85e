from __future__ import annotations

import pytest
from tests.coordination import cases

pytestmark = pytest.mark.multirank

def test_many(ranks) -> None:
    import time
    for ws in (2,2,2,4,4,4,4,2):
        t=time.time()
        print(ws, ranks.run(ws, cases.add_up, 1), time.time()-t)
