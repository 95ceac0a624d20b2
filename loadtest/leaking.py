"""The gateway, made to leak, so that `overload.py memory` shows that it would see a leak.

    python loadtest/leaking.py BYTES serve ...      keeps so many bytes of each request for ever
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    from alexnet import main as alexnet
    from serving.pipeline import Pipeline

    size, kept = int(sys.argv.pop(1)), []
    check = Pipeline.check

    def leaking(*arguments: object) -> None:
        kept.append(bytearray(b"x" * size))
        check(*arguments)  # type: ignore[arg-type]

    Pipeline.check = leaking  # type: ignore[method-assign, assignment]
    alexnet()


if __name__ == "__main__":
    main()
