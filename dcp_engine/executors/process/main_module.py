"""The parent's main module, in a worker.

Belongs here: loading what pickles call ``__main__.X``, in a process whose own main module is
something else. Does not belong here: how the parent pickles (``pickles``).

``multiprocessing`` runs the parent's main file again in every child it spawns, before anything
else. A training script without ``if __name__ == "__main__":`` would train there. Here the file is
looked at only when somebody asks for a name in it; and a file without that guard is not run: its
imports, its functions and its classes are taken out of it and nothing else.
"""

from __future__ import annotations
import __future__

import ast
import pickle
import sys
import threading
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from dcp_engine.executors.process.protocol import MainModule

__all__ = ["install", "loads"]

_LOADED_AS = "__mp_main__"
"""The name that guarded files know from ``multiprocessing``."""


def loads(data: bytes) -> Any:
    """Unpickle what the parent pickled (``dumps``), classes of its main module included.

    This runs code, as any pickle does: it is for bytes of one's own parent only.
    """
    return pickle.loads(data)


def install(main: MainModule) -> None:
    """Have ``__main__`` stand for the parent's, in this whole process. Loads nothing yet.

    In the place that any unpickler looks at, so that it works for nested pickles too.
    """
    # The other name is how a parent that multiprocessing has spawned knows it.
    sys.modules["__main__"] = sys.modules[_LOADED_AS] = _MainOnDemand(main)


class _MainOnDemand(ModuleType):
    """Stands in ``sys.modules`` until a name is asked for."""

    def __init__(self, main: MainModule) -> None:
        super().__init__("__main__", "The main module of the parent process, loaded when needed.")
        self.__dict__["_dcp_engine_source"] = main
        self.__dict__["_dcp_engine_lock"] = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        # Libraries ask a main module for its __file__ and __spec__ without wanting it.
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        with self.__dict__["_dcp_engine_lock"]:
            # While it is filled it is there already, for what looks itself up by name.
            loaded = self.__dict__.get("_dcp_engine_loaded")
            if loaded is None:
                self.__dict__["_dcp_engine_loaded"] = loaded = _LoadedMain(_LOADED_AS)
                sys.modules[_LOADED_AS] = loaded
                try:
                    _fill(loaded, self.__dict__["_dcp_engine_source"])
                except BaseException:
                    del self.__dict__["_dcp_engine_loaded"]
                    raise
                sys.modules["__main__"] = loaded
        return getattr(loaded, name)

    def __repr__(self) -> str:
        loaded = self.__dict__.get("_dcp_engine_loaded")
        return super().__repr__() if loaded is None else repr(loaded)


class _LoadedMain(ModuleType):
    """The parent's main module as far as it could be loaded here."""

    def __repr__(self) -> str:
        """What ``pickle`` says a name could not be found in, so here the advice belongs."""
        file = self.__dict__.get("__file__")
        if file is None:
            return "<the parent's main module, which has no file: use a module>"
        problems = self.__dict__.get("_dcp_engine_problems", {})
        text = f"<the parent's main module {file}: what is not found may be put into another module"
        return text + "".join(f"; {name}: {why}" for name, why in problems.items()) + ">"


def _fill(module: _LoadedMain, main: MainModule) -> None:
    """Run the guarded file, or the definitions of one without a guard."""
    if main.path is None:
        return
    names = module.__dict__
    names["__file__"] = main.path
    names["__package__"] = main.package
    problems: dict[str, str] = {}
    names["_dcp_engine_problems"] = problems
    try:
        tree = ast.parse(Path(main.path).read_bytes(), main.path)
    except (OSError, SyntaxError, ValueError) as error:
        raise AttributeError(
            f"the main module {main.path} cannot be read in the worker process: {error}; move "
            "what it defines to a module of its own"
        ) from error
    if any(_is_guard(statement) for statement in tree.body):
        exec(compile(tree, main.path, "exec", dont_inherit=True), names)
    else:
        flags = _future_flags(tree)
        for statement in tree.body:
            if _only_defines(statement):
                part = ast.Module([statement], [])
                _define(part, compile(part, main.path, "exec", flags, True), names, problems)
    _rename(names)


def _define(
    part: ast.Module, code: CodeType, names: dict[str, Any], problems: dict[str, str]
) -> None:
    try:
        exec(code, names)
    except Exception as error:
        # It stands on something that was left out. Whoever asks for it is told.
        name = getattr(part.body[0], "name", None)
        if name is not None:
            problems[name] = f"{type(error).__name__}: {error}"


def _future_flags(tree: ast.Module) -> int:
    names = [
        alias.name
        for statement in tree.body
        if isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
        for alias in statement.names
    ]
    return sum(getattr(__future__, name).compiler_flag for name in names)


def _is_guard(statement: ast.stmt) -> bool:
    """Whether this is ``if __name__ == "__main__":``, in any order, with anything beside it."""
    if not isinstance(statement, ast.If):
        return False
    found = list(ast.walk(statement.test))
    return any(isinstance(node, ast.Name) and node.id == "__name__" for node in found) and any(
        isinstance(node, ast.Constant) and node.value == "__main__" for node in found
    )


def _only_defines(statement: ast.stmt) -> bool:
    """Whether running this does nothing but to define names."""
    match statement:
        case ast.Import() | ast.ImportFrom():
            return True
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return True
        case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
            return _is_literal(value)
        case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=last):
            parts = [*body, *orelse, *last, *(line for h in handlers for line in h.body)]
            return all(_only_defines(part) or isinstance(part, ast.Pass) for part in parts)
        case _:
            return False


def _is_literal(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def _rename(names: dict[str, Any]) -> None:
    """What was defined here belongs to ``__main__``: so the parent knows it, and so it is written
    into files."""
    pending: list[Any] = list(names.values())
    while pending:
        value = pending.pop()
        if not isinstance(value, type | FunctionType) or value.__module__ != _LOADED_AS:
            continue
        value.__module__ = "__main__"
        if isinstance(value, type):
            pending.extend(vars(value).values())
