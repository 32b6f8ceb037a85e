"""Contracts: pytest classes that say what a storage backend has to do.

Belongs here: checks that hold for every backend. Does not belong here: checks of one medium, and
anything that a backend needs at run time.
"""

import pytest

# Failed assertions show their values, here as in a test module of one's own.
for _module in (
    "byte_store",
    "directories",
    "driving",
    "fixtures",
    "names",
    "places",
    "puts",
    "reader",
    "reads",
    "writer",
    "writes",
):
    pytest.register_assert_rewrite(f"{__name__}.{_module}")
