"""Pickles of what the parent's main module defines."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dcp_engine.errors import UsageError
from dcp_engine.executors.process import main_module as loading
from dcp_engine.executors.process import pickles
from dcp_engine.executors.process.main_module import loads
from dcp_engine.executors.process.pickles import dumps
from dcp_engine.executors.process.protocol import MainModule
from tests.executors.conftest import ROOT

# -- what a parent cannot send -----------------------------------------------------------------


@dataclass
class Part:
    name: str
    inner: Any = None


class Plain:
    def __init__(self, held: Any) -> None:
        self.held = held


def test_what_can_be_pickled_comes_back() -> None:
    value = {"a": [1, Part("p")], "f": os.path.join}
    assert loads(dumps(value)) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (threading.Lock(), r"the value \(a _thread\.lock\)"),
        ({"a": 1, "b": [0, threading.Lock()]}, r"\['b'\]\[1\] \(a _thread\.lock\)"),
        (Part("p", Plain((1, threading.Lock()))), r"\.inner\.held\[1\] \(a _thread\.lock\)"),
        ({"writer": lambda: None}, r"\['writer'\] \(a builtins\.function\)"),
        (Part("p", type("Local", (), {})()), r"\.inner \(a tests\.executors\.test_main_module\.L"),
    ],
)
def test_what_cannot_is_named(value: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text + ".* cannot be sent to a worker process") as failed:
        dumps(value)
    assert failed.value.hint is not None
    assert "thread" in failed.value.hint


def test_a_loop_in_the_value_ends() -> None:
    value: list[Any] = [threading.Lock()]
    value.insert(0, value)
    with pytest.raises(UsageError, match=r"\(a builtins\.list\)"):
        dumps(value)


def test_classes_of_an_interactive_session_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    here = ModuleType("__main__")
    exec("class Mine: pass\ndef function(): pass", here.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", here)
    assert pickles.main_module().path is None
    for value in (here.Mine, here.Mine(), here.function, {"deep": [here.Mine()]}):
        pickle.dumps(value)
        with pytest.raises(UsageError, match="the main module, which has no file here"):
            dumps(value)
    assert loads(dumps([1, "two", None])) == [1, "two", None]


@pytest.mark.parametrize("file", ["<stdin>", "/no/such/file.py", None])
def test_a_main_module_without_a_file(monkeypatch: pytest.MonkeyPatch, file: str | None) -> None:
    here = ModuleType("__main__")
    if file is not None:
        here.__file__ = file
    monkeypatch.setitem(sys.modules, "__main__", here)
    assert pickles.main_module() == MainModule(path=None, package=None)


# -- what a worker loads -----------------------------------------------------------------------


@pytest.fixture
def as_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Main modules as a worker sees them."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setitem(sys.modules, "__mp_main__", sys.modules["__main__"])
    loading_effects.clear()

    def load(path: Path, package: str | None = None) -> ModuleType:
        loading.install(MainModule(path=str(path), package=package))
        return sys.modules["__main__"]

    yield load


loading_effects: list[str] = []

_DEFINITIONS = """
from __future__ import annotations
import enum
import json as other
from dataclasses import dataclass
from tests.executors.test_main_module import loading_effects
try:
    import no_such_module
except ImportError:
    no_such_module = None
LIMIT = 3
SIZES: tuple[int, ...] = (1, 2)

@dataclass
class Point:
    x: int
    y: Point | None = None

    class Inner:
        pass

class Colour(enum.Enum):
    RED = 1

def double(value):
    return value * LIMIT

"""
_EFFECTS = """
loading_effects.append("ran as " + __name__)
COMPUTED = max(1, 2)
"""
_AFTER = """
class Late(Base):
    pass
"""
_BASE = "Base = type('Base', (), {})\n"


def pickled(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n."


def test_a_file_without_a_guard_is_not_run(as_worker: Any, tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text(_DEFINITIONS + _EFFECTS + _BASE + _AFTER)
    main = as_worker(file)
    point = pickle.loads(pickled("__main__", "Point"))
    assert loading_effects == []
    assert point(1, point(2)).y.x == 2
    assert main.double(2) == 6
    assert main.Colour.RED.value == 1
    assert (main.SIZES, main.no_such_module) == ((1, 2), None)
    assert main.other.__name__ == "json"
    assert not hasattr(main, "COMPUTED")
    with pytest.raises(AttributeError, match=r"'Late' .* NameError: name 'Base' is not defined"):
        pickle.loads(pickled("__main__", "Late"))


def test_a_file_with_a_guard_is_run_as_multiprocessing_would(
    as_worker: Any, tmp_path: Path
) -> None:
    file = tmp_path / "train.py"
    guard = "if __name__ == '__main__':\n    loading_effects.append('the program')\n"
    file.write_text(_DEFINITIONS + _EFFECTS + _BASE + _AFTER + guard)
    main = as_worker(file)
    assert loading_effects == []  # nobody has asked yet
    late = pickle.loads(pickled("__main__", "Late"))
    assert loading_effects == ["ran as __mp_main__"]
    assert late.__mro__[1].__name__ == "Base"
    assert main.COMPUTED == 2
    assert pickle.loads(pickled("__mp_main__", "Late")) is late
    assert loading_effects == ["ran as __mp_main__"]  # once


def test_the_name_that_multiprocessing_gives_it(as_worker: Any, tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text(_DEFINITIONS)
    as_worker(file)
    point = pickle.loads(pickled("__mp_main__", "Point"))
    assert point is pickle.loads(pickled("__main__", "Point"))


def test_what_was_loaded_goes_by_the_parents_name(as_worker: Any, tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text(_DEFINITIONS)
    main = as_worker(file)
    for value in (main.Point, main.Point.Inner, main.Colour, main.double):
        assert value.__module__ == "__main__"
        assert loads(dumps(value)) is value
    assert main.dataclass.__module__ == "dataclasses"


def test_looking_for_what_every_module_has_loads_nothing(as_worker: Any, tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text("raise SystemExit\nif __name__ == '__main__': pass\n")
    main = as_worker(file)
    assert getattr(main, "__file__", "nothing") == "nothing"
    assert main.__spec__ is None
    assert not hasattr(main, "__path__")
    for _ in range(2):
        with pytest.raises(SystemExit):
            _ = main.anything


@pytest.mark.parametrize("content", ["def (", None, "\0"])
def test_a_file_that_cannot_be_read(as_worker: Any, tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "train.py"
    if content is not None:
        file.write_text(content)
    main = as_worker(file)
    with pytest.raises(AttributeError, match="cannot be read in the worker process"):
        _ = main.X


def test_the_parent_has_no_file(as_worker: Any) -> None:
    loading.install(MainModule(path=None))
    with pytest.raises(AttributeError, match=r"'X' .* which has no file"):
        pickle.loads(pickled("__main__", "X"))


# -- whole programs ----------------------------------------------------------------------------

_PROGRAM = """
import os, sys
from dcp_engine.executors.process import WorkerProcess, WorkerSettings, dumps

print("running", __name__, flush=True)

class Job:
    def __init__(self, text):
        self.text = text
    def __repr__(self):
        return "Job " + self.text

def repeat(text):
    return text * 2

worker = WorkerProcess(WorkerSettings(handler="tests.executors.handlers:tools", name="w"))
worker.start()
try:
    print(worker.call("unpickle", dumps(Job("one"))).decode())
    print(worker.call("use_main", dumps((repeat, b"ab"))).decode())
except Exception as error:
    print(type(error).__name__, error)
worker.close()
"""


def run(light: dict[str, str], *arguments: str, text: str | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, **light},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_script_without_a_guard(light: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + _PROGRAM)
    # "running" once: the script is not run again in the worker.
    assert run(light, str(script)) == "running __main__\nJob one\nabab\n"


def test_a_module_run_by_name(light: dict[str, str], tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("SUFFIX = '!'\n")
    (package / "train.py").write_text("from .part import SUFFIX\n" + _PROGRAM)
    path = {"PYTHONPATH": os.pathsep.join([light["PYTHONPATH"], str(tmp_path)])}
    assert run(path, "-m", "package.train") == "running __main__\nJob one\nabab\n"


@pytest.mark.parametrize("how", ["-c", "-"])
def test_a_program_without_a_file(light: dict[str, str], how: str) -> None:
    arguments = ("-c", _PROGRAM) if how == "-c" else ("-",)
    out = run(light, *arguments, text=_PROGRAM if how == "-" else None).splitlines()
    assert out[0] == "running __main__"
    assert out[1].startswith("UsageError [usage] the value (a __main__.Job) cannot be sent")
    assert len(out) == 2
