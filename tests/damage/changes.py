"""Everything that can happen to the files of a checkpoint, one change at a time.

Belongs here: drawing changes from what is stored. Does not belong here: checkpoints and reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

__all__ = ["Change", "changes", "is_data"]

Files = Mapping[str, bytes]
REGION = 512


@dataclass(frozen=True, kw_only=True)
class Change:
    """Other contents for some files; None removes one."""

    kind: str
    where: str
    files: Mapping[str, bytes | None]


def is_data(name: str) -> bool:
    return name.endswith(".safetensors")


def changes(files: Files, other: Files, *, every: bool) -> Iterator[Change]:
    """All changes of a checkpoint's ``files``; ``other`` is another checkpoint of the same form.

    Args:
        every: every bit of every byte, and every length; else one bit of every byte at a stride
            (every byte of short files; in data one or two of each 512-byte region) and a choice
            of lengths.
    """
    for name, content in files.items():
        for change in _in_place(name, content, every=every):
            if change.files[name] != content:
                yield change
        yield Change(kind="removed", where=name, files={name: None})
    yield from _swaps(files, other)


def _in_place(name: str, content: bytes, *, every: bool) -> Iterator[Change]:
    size = len(content)
    positions = range(size) if every else _positions(name, content)
    for at in positions:
        for bit in range(8) if every else (at % 8,):
            flipped = content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
            yield _one("flipped bit", name, flipped, f"{at}.{bit}")
        if content[at] and (every or at % 2 == 0):
            zeroed = content[:at] + b"\0" + content[at + 1 :]
            yield _one("zeroed byte", name, zeroed, f"{at}")
    for begin in range(0, size, REGION):
        end = min(begin + REGION, size)
        zeroed = content[:begin] + bytes(end - begin) + content[end:]
        yield _one("zeroed region", name, zeroed, f"{begin}")
    for length in range(size) if every else _lengths(size):
        yield _one("truncated", name, content[:length], f"{length}")
    for tail in (b"\0", b"\n", content[-1:], bytes(REGION), content):
        yield _one("extended", name, content + tail, f"{len(tail)}")
    yield _one("extended", name, b"\0" + content, "front")


def _one(kind: str, name: str, content: bytes, where: str) -> Change:
    return Change(kind=kind, where=f"{name} {where}", files={name: content})


def _positions(name: str, content: bytes) -> list[int]:
    """Text: every eighth byte; digests: every fifth; data: header, padding and each region."""
    size = len(content)
    if is_data(name):
        start = 8 + int.from_bytes(content[:8], "little")
        text = content.rindex(b"}", 0, start) + 1
        found = {*range(0, text, 7), *range(text, start, REGION), start - 1}
        found |= {*range(start, size, 311), size - 1}
        return sorted(found)
    return sorted({*range(0, size, 5 if name.endswith(".digests") else 8), size - 1})


def _lengths(size: int) -> list[int]:
    """None, some, half, and all but a little."""
    near = {0, 1, 7, 8, 9, size // 2, size - 58, size - 57, size - 56, size - 2, size - 1}
    return sorted(n for n in near | set(range(0, size, REGION)) if 0 <= n < size)


def _swaps(files: Files, other: Files) -> Iterator[Change]:
    """Each file with the content of each other one, of either checkpoint; pairs exchanged."""
    for name, content in files.items():
        for source, foreign in files.items():
            if foreign != content:
                where = f"{name} <- {source}"
                yield Change(kind="swapped", where=where, files={name: foreign})
            if name < source and foreign != content:
                both = {name: foreign, source: content}
                yield Change(kind="exchanged", where=f"{name} <-> {source}", files=both)
        for source, foreign in other.items():
            if foreign != content:
                where = f"{name} <- {source} of another checkpoint"
                yield Change(
                    kind="swapped with another checkpoint", where=where, files={name: foreign}
                )
