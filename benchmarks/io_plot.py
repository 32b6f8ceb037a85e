"""A bar chart as SVG, by hand: the plots need no library."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

__all__ = ["bar_chart"]

_BAR, _GAP, _LEFT, _WIDTH = 22, 8, 150, 420


def bar_chart(title: str, bars: Mapping[str, float], unit: str) -> str:
    """Horizontal bars, the longest as wide as there is room; readable on light and on dark."""
    most = max(bars.values(), default=0.0) or 1.0
    height = 40 + len(bars) * (_BAR + _GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 90}" '
        f'height="{height}" font-family="sans-serif" font-size="13" fill="#777">',
        f'<text x="0" y="18" font-weight="bold">{escape(title)}</text>',
    ]
    for at, (name, value) in enumerate(bars.items()):
        top = 32 + at * (_BAR + _GAP)
        colour = "#2a7de1" if name.startswith("ours") else "#9aa5b1"
        width = max(1.0, value / most * _WIDTH)
        lines += [
            f'<text x="{_LEFT - 8}" y="{top + 16}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LEFT}" y="{top}" width="{width:.1f}" height="{_BAR}" fill="{colour}"/>',
            f'<text x="{_LEFT + width + 6:.1f}" y="{top + 16}">{value:.2f} {unit}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
