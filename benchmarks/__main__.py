"""``python -m benchmarks <name> [options]``: one sub-command per measurement.

Belongs here: the names. Everything else is in the module of that name, whose ``add_arguments``
declares its options and whose ``main`` runs it and returns the exit status.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

COMMANDS = {
    "async": "asynchronous saves: how long training waits and how much it is slowed, against DCP",
    "io": "saves and loads: wall and processor time against raw writes, DCP and safetensors",
    "object_store": "loads from a slow medium: streams used, against DCP over fsspec",
    "planning": "planning and coordination of many ranks: time, bytes, memory, store operations",
    "shared_reads": "reading once and handing on, against every rank reading for itself",
}


_MODULES = {"async": "async_saves"}  # the word is taken in Python


def main(arguments: list[str] | None = None) -> int:
    """Run one measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="\n".join(f"{name:12} {summary}" for name, summary in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=COMMANDS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of that measurement (-h)")
    chosen = parser.parse_args(arguments)
    # Threads of OpenMP that spin while others compute make torch's copies 30 times slower on a
    # busy machine; before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Only this one: another measurement may need what is not installed here.
    module = import_module(f"benchmarks.{_MODULES.get(chosen.name, chosen.name)}")
    own = argparse.ArgumentParser(
        prog=f"{parser.prog} {chosen.name}", description=COMMANDS[chosen.name]
    )
    module.add_arguments(own)
    status: int = module.main(own.parse_args(chosen.options))
    return status


if __name__ == "__main__":
    sys.exit(main())
