"""The results as one self-contained HTML page, to be sent to a colleague."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bench_plot import plot
from bench_results import Results, life_rows, setup_rows, speed_rows, target_rows, targets

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #e3e6ea }
th { font-weight: 600; color: #555 }
h2 { font-size: 1.1rem; margin-top: 2rem }
code, pre { font-size: .85rem; white-space: pre-wrap }
"""
METHOD = (
    "Every server is started afresh in every round, in an order that turns; nothing else runs beside it. "
    "Clients are a closed loop over kept connections on the same machine. A load is counted from the moment "
    "each client has had its first answer, so the queue is as long as it gets. Images a second: the median "
    "of the rounds, and their least and most. Percentiles: over the answers of all rounds together; their "
    "count stands beside them. Start: from the process's start to its first answered photograph. Memory: "
    "of the process and all below it after the loads, pages that they share counted once (PSS)."
)


def page(results: Results, facts: Sequence[str]) -> str:
    """`facts`: the command, the machine, the photographs, one line each."""
    said = "".join(f"<li>{escape(name)}: {escape(title)}</li>" for name, title in results.titles.items())
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>alexnet-serving: benchmark</title>',
        f"<style>{STYLE}</style><h1>This gateway beside what else might be used</h1>",
        f"<pre>{escape(chr(10).join(facts))}</pre>{plot(results)}<ul>{said}</ul>",
        "<h2>Targets</h2>" + html_table(target_rows(targets(results))),
        "<h2>Speed and latency</h2>" + html_table(speed_rows(results)),
        "<h2>Start and memory</h2>" + html_table(life_rows(results)),
    ]
    if results.tried:
        parts.append("<h2>The peers' set-ups; * took part</h2>" + html_table(setup_rows(results)))
    return "\n".join([*parts, f"<h2>Method</h2><p>{METHOD}</p></html>", ""])


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row holds the headings."""

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + row(rows[0], "th") + "".join(row(each, "td") for each in rows[1:]) + "</table>"
