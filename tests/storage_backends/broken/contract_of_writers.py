"""The contracts on every broken writer and reader; as ``contract_of_stores``."""

from __future__ import annotations

from tests.compat.file_storage import FileReader, FileWriter
from tests.storage_backends.broken.writers import READERS_CAUGHT_BY, WRITERS_CAUGHT_BY
from tests.storage_backends.in_directories import InDirectories


class OfBroken(InDirectories):
    writer = FileWriter
    reader = FileReader


class TestSound(OfBroken):
    notices_damage = False  # nor would it, so this one check is skipped


for writer in WRITERS_CAUGHT_BY:
    name = f"Test{writer.__name__}"
    globals()[name] = type(name, (OfBroken,), {"writer": writer})
for reader in READERS_CAUGHT_BY:
    name = f"Test{reader.__name__}"
    globals()[name] = type(name, (OfBroken,), {"reader": reader})
