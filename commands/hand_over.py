"""A published version handed to running Triton servers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from rich.markup import escape

from commands.terminal import err
from commands.wiring import extra, settings_of
from serving.errors import MalformedRequest


def hand_over_to(triton: str) -> Callable[[Path], bool]:
    """What has the servers load a version's folder, and says whether all of them serve it."""
    if not triton:
        return lambda _: True
    with extra("triton"):
        from serving.triton_load import load_everywhere
    from serving.triton_target import each_server

    try:
        servers = each_server(triton)
    except ValueError as error:
        raise MalformedRequest(f"--triton: {error}") from error
    key = settings_of({}).triton_admin_key.get_secret_value()

    def hand_over(version: Path) -> bool:
        faults = asyncio.run(load_everywhere(servers, version, key))
        for fault in faults:
            said = escape(f"{version} is published, but not served everywhere. {fault}")
            err.print(f"[red]alexnet:[/] {said}", highlight=False, soft_wrap=True)
        if not faults:
            err.print(f"{version}: served by {triton}", highlight=False, soft_wrap=True)
        return not faults

    return hand_over
