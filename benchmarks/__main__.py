"""``python -m benchmarks <name> [options]``: one sub-command per measurement.

Belongs here: the names. Everything else is in the module of that name, whose ``add_arguments``
declares its options and whose ``main`` runs it and returns the exit status.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

COMMANDS = {
    "planning": "planning and coordination of many ranks: time, bytes, memory, store operations",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one measurement."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="name")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        import_module(f"benchmarks.{name}").add_arguments(command)
    options = parser.parse_args(arguments)
    status: int = import_module(f"benchmarks.{options.command}").main(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
