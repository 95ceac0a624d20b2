"""The gateway's process, before it listens."""

from __future__ import annotations

import subprocess
import sys

from support import ROOT

# In a process of its own: this one has imported the framework long ago.
_LOADED_BESIDE = """
import asyncio, sys, threading

from serving.errors import ModelNotReady
from serving.server import serve
from serving.settings import Settings

came = threading.Event()
imports = type("Imports", (), {"find_spec": lambda self, name, *_: name == "fastapi" and came.set() or None})
sys.meta_path.insert(0, imports())


class Engine:
    async def start(self):
        assert await asyncio.to_thread(came.wait, 30), "not imported before the engine has loaded"
        raise ModelNotReady("seen")


assert "fastapi" not in sys.modules, "imported before the engine begins to load"
try:
    asyncio.run(serve(Settings(), Engine(), print))
except ModelNotReady as error:
    print(error)
"""


def test_the_web_framework_is_imported_while_the_model_loads_and_a_load_that_fails_is_told() -> None:
    command = [sys.executable, "-c", _LOADED_BESIDE]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout) == (0, "seen\n"), ran.stderr
