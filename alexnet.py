"""The `alexnet` command: the composition root. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import sys

import typer
from rich.markup import escape

from commands.classify import classify
from commands.evaluate import evaluate
from commands.export import export
from commands.keys import keys
from commands.score import score
from commands.serve import serve, triton, verify
from commands.terminal import err
from commands.train import prepare, report, train
from commands.versions import prune, rollback, versions
from commands.weights import compress, torchvision
from serving.errors import ServingError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=("AlexNet (Krizhevsky, Sutskever, Hinton 2012): trained, exported and served."),
)
for command in (serve, triton, score, classify, prepare, train, evaluate, report, compress, export, versions,
                rollback, prune, verify):  # fmt: skip
    app.command()(command)

imports = typer.Typer(no_args_is_help=True, help="Make a checkpoint from somebody else's weights.")
imports.command()(torchvision)
app.add_typer(imports, name="import")
app.add_typer(keys, name="key")


def main() -> None:
    """Run the command; an error of the project's own ends it with one line and status 1."""
    try:
        app()
    except Exception as error:
        if not _is_ours(error):
            raise
        err.print(f"[red]alexnet:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _is_ours(error: Exception) -> bool:
    return isinstance(error, ServingError) or type(error).__module__.split(".")[0] in ("model", "export")


if __name__ == "__main__":
    main()
