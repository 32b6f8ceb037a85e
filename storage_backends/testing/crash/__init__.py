"""The crash explorer: records what a program does to a directory, and crashes it everywhere.

Every position of the record is tried with every choice (within bounds) of what had reached the
disk by then, after the manner of ALICE and CrashMonkey; a reader then opens what is left. What may
be left is in ``persistence``, the engine's own scenarios are in ``scenarios``, and
``python -m storage_backends.testing.crash`` runs them. For a backend of your own that writes to a
local file system::

    recorder = Recorder(directory)
    with recording(recorder):
        my_save(directory, "new")
        recorder.mark("returned:new")
    explorer = Explorer("overwrite", reader=my_reader, allowed=one_save("old", "new"))
    explorer.explore(recorder.record())
    assert not explorer.report().violations

``my_reader`` opens a directory and says in a word what it got. Linux only.
"""

from storage_backends.testing.crash.explorer import Explorer, Report, Violation
from storage_backends.testing.crash.interception import recording
from storage_backends.testing.crash.operations import Record
from storage_backends.testing.crash.persistence import Bounds
from storage_backends.testing.crash.recorder import Recorder, RecordError
from storage_backends.testing.crash.rules import (
    always,
    one_after_another,
    one_of_several,
    one_save,
    shares,
)
from storage_backends.testing.crash.turns import Turns, interleavings

__all__ = [
    "Bounds",
    "Explorer",
    "Record",
    "RecordError",
    "Recorder",
    "Report",
    "Turns",
    "Violation",
    "always",
    "interleavings",
    "one_after_another",
    "one_of_several",
    "one_save",
    "recording",
    "shares",
]
