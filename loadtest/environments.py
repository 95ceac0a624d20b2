"""An environment for each peer under .bench/: made once, kept, and made anew when what it holds changes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from servers import ROOT

FOLDER = ROOT / ".bench"
COMMON = ("onnxruntime==1.32.0", "numpy==2.4.6", "pillow==13.0.0", "python-multipart==0.0.34")
"""The versions of constraints.txt: every peer has the engine and the decoder that the gateway has."""
PEERS: dict[str, tuple[str, ...]] = {
    "fastapi": ("fastapi==0.165.0", "uvicorn==0.54.0", "uvloop==0.23.0", "httptools==0.9.0"),
    "litserve": ("litserve==0.2.19",),
    "bentoml": ("bentoml==1.4.39",),
    "ray": ("ray[serve]==2.60.0",),
}


def environment(peer: str, say: Callable[[str], None]) -> Path:
    """The `bin` of the peer's environment, made if need be: about half a minute, by pip."""
    folder, wanted = FOLDER / f"venv-{peer}", "\n".join((*PEERS[peer], *COMMON, sys.version))
    mark = folder / ".complete"
    if not mark.exists() or mark.read_text() != wanted:
        say(f"making {folder.relative_to(ROOT)}: {', '.join(PEERS[peer])}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(folder / "bin" / "pip"), "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, *PEERS[peer], *COMMON], check=True)
        mark.write_text(wanted)
    return folder / "bin"
