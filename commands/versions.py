"""alexnet versions, rollback and prune: what the repository holds."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from commands.hand_over import hand_over_to
from commands.options import REPOSITORY, Repository, TritonServers
from commands.terminal import out


def versions(
    model: Annotated[str, typer.Argument()] = "alexnet", repository: Repository = REPOSITORY
) -> None:
    """List the versions of a model; the highest that is not withdrawn is served."""
    from export.versions import listed

    present = listed(repository / model)
    served = max((version.number for version in present if not version.withdrawn), default=None)
    table = Table("version", "state", "exported", "MB", "max |dp|", "top-1 %, ten crops", box=None)
    for version in present:
        provenance = version.provenance
        state = "withdrawn" if version.withdrawn else "served" if version.number == served else ""
        size = provenance.get("model", {}).get("bytes")
        difference = provenance.get("parity", {}).get("max_abs_difference")
        accuracy = provenance.get("accuracy", {}).get("top1_ten")
        table.add_row(
            str(version.number),
            state,
            provenance.get("exported_at", ""),
            "" if size is None else f"{size / 1e6:.1f}",
            "" if difference is None else f"{difference:.1e}",
            "" if accuracy is None else f"{100 * accuracy:.2f}",
        )
    out.print(table)


def rollback(
    model: Annotated[str, typer.Argument()] = "alexnet",
    to: Annotated[int | None, typer.Option(help="[default: the version before the newest]")] = None,
    repository: Repository = REPOSITORY,
    triton: TritonServers = "",
) -> None:
    """Serve an earlier version again; the later ones are withdrawn. Running gateways follow at once."""
    from export.versions import rollback as go_back

    hand_over = hand_over_to(triton)
    number = go_back(repository / model, to)
    out.print(f"{model}: version {number} is the newest now")
    raise typer.Exit(0 if hand_over(repository / model / str(number)) else 1)


def prune(
    model: Annotated[str, typer.Argument()] = "alexnet",
    keep: Annotated[int, typer.Option(min=1, help="how many of the newest stay")] = 3,
    repository: Repository = REPOSITORY,
) -> None:
    """Delete old and withdrawn versions."""
    from export.versions import prune as delete

    gone = delete(repository / model, keep)
    out.print(f"{model}: deleted {', '.join(map(str, gone)) or 'nothing'}", highlight=False)
