"""What is called when the main thread has run to its end, and what still works then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import atexit, sys, threading, types
from concurrent.futures import ThreadPoolExecutor

# The package itself would import torch, which takes seconds and is not wanted here.
package = types.ModuleType("dcp_engine")
package.__path__ = [sys.argv[1] + "/dcp_engine"]
sys.modules["dcp_engine"] = package
from dcp_engine.executors.main_end import call_at_main_end

class Worker:
    def __init__(self, name):
        self.name = name

    def work(self):
        with ThreadPoolExecutor(1) as pool:
            print(self.name, pool.submit(lambda: "worked").result(), flush=True)

    def ask_again(self):
        print("again", call_at_main_end(self.work), flush=True)

kept, dropped = Worker("kept"), Worker("dropped")
print([call_at_main_end(each.work) for each in (kept, dropped)])
del dropped
go_on, ended = threading.Event(), []
threading.Thread(target=lambda: ended.append(go_on.wait())).start()
call_at_main_end(kept.ask_again)
atexit.register(lambda: print("at exit, the other thread is over:", ended))

class Last:
    def let_go(self):
        go_on.set()

last = Last()
atexit.register(lambda: last)
call_at_main_end(last.let_go)
print("main ends", flush=True)
"""


def test_executors_still_work_and_other_threads_go_on() -> None:
    """Later registrations come first; an object that is gone is not called; when the end has begun
    it is too late to register."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, root], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "[True, True]",
        "main ends",
        "again False",
        "kept worked",
        "at exit, the other thread is over: [True]",
    ]
