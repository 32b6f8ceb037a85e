"""Changes to valid documents, as somebody would make them who knows the format.

Belongs here: mutations of trees (JSON and MessagePack) and of bytes, and JSON that no encoder
writes: keys twice, ``NaN``, numbers without end, nesting without end. Does not belong here: which
documents there are (``documents``) and what is asked of their readers (``targets``).
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st


@dataclass(frozen=True)
class Raw:
    """JSON text that is written as it is."""

    text: bytes


@dataclass
class Pairs:
    """A JSON object as its pairs, which may hold a key twice."""

    items: list[list[Any]]


INTEGERS = (0, 1, -1, 2, 63, 64, 65, 127, 128, 255, 4095, 4096, 4097)
HUGE = tuple(sign * (1 << bits) + by for bits in (31, 32, 53, 60, 62, 63, 64, 70, 200)
             for sign in (1, -1) for by in (-1, 0, 1))  # fmt: skip
TEXTS = (
    "", "0:1", "0:-1", "5:9999999999999999999", "1:0", "..", "../../x", "/etc/passwd", "extra/../x",
    "a" * 5000, "\x00", "\u2028", "float7", "float32", "model.weight", "rng", "lr", "AQ==", "d",
    "__metadata__", "F32", "U8",
)  # fmt: skip
RAW = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"0.0", b"1e3", b"01", b"1.", b"9" * 5000,
    b"-" + b"9" * 300, b'"\\ud800"', b'"\\u0000"', b'"\xff"', b"[" * 3000 + b"]" * 3000,
    b'{"a":' * 3000 + b"1" + b"}" * 3000, b"[" * 60_000, b'{"a":1,"a":2}', b" 1", b"",
)  # fmt: skip

_scalars: st.SearchStrategy[Any] = (
    st.sampled_from(INTEGERS)
    | st.sampled_from(HUGE)
    | st.sampled_from(TEXTS)
    | st.sampled_from([None, True, False, 0.5, -1e300, [], [[]], [0], [-1, 1 << 62], ["a", "a"]])
)
_json_values = _scalars | st.sampled_from(RAW).map(Raw) | st.just(Pairs([]))
_bytes = st.binary(max_size=12) | st.sampled_from([b"\x00" * 64, b"\xff" * 64])


def tree_of(value: Any) -> Any:
    """A decoded JSON value in the form that the mutations change."""
    if isinstance(value, dict):
        return Pairs([[key, tree_of(item)] for key, item in value.items()])
    return [tree_of(item) for item in value] if isinstance(value, list) else value


def render(tree: Any) -> bytes:
    """Its JSON, without white space."""
    if isinstance(tree, Raw):
        return tree.text
    if isinstance(tree, Pairs):
        return b"{%b}" % b",".join(render(key) + b":" + render(item) for key, item in tree.items)
    if isinstance(tree, list):
        return b"[%b]" % b",".join(map(render, tree))
    return json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _places(tree: Any, found: list[tuple[Any, int]]) -> list[tuple[Any, int]]:
    """Every (container, index) below ``tree``; of pairs, the pair."""
    inside = tree.items if isinstance(tree, Pairs) else tree if isinstance(tree, list) else ()
    for index in range(len(inside)):
        found.append((tree, index))
        _places(inside[index][1] if isinstance(tree, Pairs) else inside[index], found)
    return found


def mutate_tree(data: st.DataObject, tree: Any, *, most: int = 3, binary: bool = False) -> Any:
    """``tree`` (changed in place) after one to ``most`` mutations. ``binary``: for MessagePack,
    whose leaves may be bytes and which has no text of its own."""
    # Copies: what a mutation changes in place must not be drawn again.
    values = (_scalars | _bytes if binary else _json_values).map(copy.deepcopy)
    for _ in range(data.draw(st.integers(1, most))):
        places = _places(tree, [])
        if not places:
            return data.draw(values)
        holder, index = places[data.draw(st.integers(0, len(places) - 1))]
        inside = holder.items if isinstance(holder, Pairs) else holder
        entry = inside[index]
        what = data.draw(st.sampled_from(("put", "put", "nudge", "nudge", "drop", "twice", "swap",
                                          "wrap", "key")))  # fmt: skip
        if what == "drop":
            del inside[index]
        elif what == "twice":
            inside.insert(index, copy.deepcopy(entry))
        elif what == "swap":
            other = data.draw(st.integers(0, len(inside) - 1))
            inside[index], inside[other] = inside[other], entry
        elif what == "key" and isinstance(holder, Pairs):
            entry[0] = data.draw(st.sampled_from(TEXTS) | st.sampled_from(["new", inside[0][0]]))
        elif isinstance(holder, Pairs):
            inside[index] = [entry[0], _changed(data, what, entry[1], values)]
        else:
            inside[index] = _changed(data, what, entry, values)
    return tree


def _changed(data: st.DataObject, what: str, value: Any, values: st.SearchStrategy[Any]) -> Any:
    if what == "wrap":
        return [value]
    if what == "nudge" and type(value) is int:
        by = data.draw(st.sampled_from([1, -1, 8, -8, 4096, 1 << 31, 1 << 32, 1 << 60, 1 << 63]))
        return data.draw(st.sampled_from([value + by, -value, value * 2, value ^ by]))
    if what == "nudge" and isinstance(value, str) and value:
        at = data.draw(st.integers(0, len(value) - 1))
        return (
            value[:at] + data.draw(st.sampled_from(["", ".", "/", "9", "\x00", "é"])) + value[at:]
        )
    if what == "nudge" and isinstance(value, bytes):
        return mutate_bytes(data, value)
    return data.draw(values)


_PIECES = (
    b"-", b"9", b"[", b"]", b"{", b"}", b'"', b",", b":", b"null", b"\x00", b"\xff" * 8,
    b"\xff" * 7 + b"\x7f", b"\x01", b"\x80",
)  # fmt: skip


def mutate_bytes(data: st.DataObject, value: bytes) -> bytes:
    """``value`` after one to four mutations: bytes changed, put in, taken out, moved or cut off."""
    changed = bytearray(value)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed)))
        what = data.draw(
            st.sampled_from(("over", "over", "insert", "drop", "cut", "repeat", "bit"))
        )
        piece = data.draw(st.sampled_from(_PIECES) | st.binary(min_size=1, max_size=8))
        if what == "over":
            changed[at : at + len(piece)] = piece
        elif what == "insert":
            changed[at:at] = piece
        elif what == "drop":
            del changed[at : at + data.draw(st.integers(1, 16))]
        elif what == "cut":
            del changed[at:]
        elif what == "repeat":
            changed[at:at] = changed[max(at - 16, 0) : at]
        elif at < len(changed):
            changed[at] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(changed)
