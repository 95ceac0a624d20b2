"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

REPOSITORY = Path("model_repository")
Repository = Annotated[Path, typer.Option("--repository", help="the model repository's folder")]
TritonServers = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT[,HOST:PORT...]",
        help="have these servers (gRPC; a name: all its addresses) load it and ask them its golden images",
    ),
]


