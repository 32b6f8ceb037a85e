"""``ByteStoreContract``: all that a ``ByteStore`` promises, as a pytest class.

Belongs here: the sum of the groups of checks. Does not belong here: checks (``writes``, ``puts``,
``reads``, ``directories``, ``names``) and the fixtures (``fixtures``).
"""

from __future__ import annotations

from storage_backends.testing.contracts.directories import DirectoryChecks
from storage_backends.testing.contracts.names import NameChecks
from storage_backends.testing.contracts.puts import PutChecks
from storage_backends.testing.contracts.reads import ReadChecks
from storage_backends.testing.contracts.writes import WriteChecks

__all__ = ["ByteStoreContract"]


class ByteStoreContract(WriteChecks, PutChecks, ReadChecks, DirectoryChecks, NameChecks):
    """Derive from it, and override the fixtures ``open_store`` and ``medium``::

        class TestMyStore(ByteStoreContract):
            @pytest.fixture
            def open_store(self, tmp_path):
                return lambda: MyStore(tmp_path / "checkpoint")

            @pytest.fixture
            def medium(self, tmp_path):
                return DirectoryMedium(tmp_path / "checkpoint")

    Checks of what a store's flags rule out are skipped, with the flag as reason. ``LARGE``,
    ``MANY_FILES`` and ``ROUNDS`` may be set lower for a medium that is slow.
    """
