"""Tables, targets, JSON, and on which machine.

Belongs here: what every measurement prints in the same way. Does not belong here: measuring.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Target", "fitted_exponent", "machine", "markdown_table", "number", "write_json"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something that was promised, and what came out."""

    text: str
    measured: float
    limit: float
    unit: str = ""
    at_least: bool = False
    """``limit`` is the least; else it is the most."""

    @property
    def passed(self) -> bool:
        """Whether the promise was kept."""
        if self.at_least:
            return self.measured >= self.limit
        return self.measured <= self.limit

    def line(self) -> str:
        """``pass    first plan at 1,024 ranks: 0.7 s (at most 1 s)``."""
        verdict = "pass" if self.passed else "missed"
        bound = "at least" if self.at_least else "at most"
        measured, limit = (f"{number(v)} {self.unit}".strip() for v in (self.measured, self.limit))
        return f"{verdict:6}  {self.text}: {measured} ({bound} {limit})"


def number(value: float | None) -> str:
    """Three significant digits, thousands separated; an empty cell for None."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{round(value, digits):,.{digits}f}"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that is readable as text too."""
    widths = [
        max(len(column), *(len(row[at]) for row in rows)) if rows else len(column)
        for at, column in enumerate(columns)
    ]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(columns, widths, strict=True)) + " |",
        "| " + " | ".join("-" * w for w in widths) + " |",
    ]
    lines += [
        "| " + " | ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join(lines)


def fitted_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of a straight line through the logarithms: 1 is linear growth."""
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    return {
        "processor": _first("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": str(os.cpu_count()),
        "memory": _first("/proc/meminfo", "MemTotal"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "load average at the start": ", ".join(f"{load:.1f}" for load in os.getloadavg()),
    }


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Keep all numbers, for comparison with another run."""
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def _first(file: str, field: str) -> str:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")
