"""The results as one picture: bars of images a second, with the least and the most; SVG by hand."""

from __future__ import annotations

from html import escape

from bench_results import AT, Results

ROW, LEFT, WIDTH, RIGHT = 34, 250, 470, 130
OURS, PEERS = "#0b6e4f", "#9aa5b1"


def plot(results: Results) -> str:
    """Images a second at AT clients, a bar for each server, its rounds' range as a whisker."""
    rows = [(name, rate) for name in results.titles if (rate := results.rate(name))]
    most = max((rate.high for _, rate in rows), default=1.0)
    height = ROW * len(rows) + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" '
        'font-family="system-ui, sans-serif" font-size="13" role="img">',
        f"<title>Images a second at {AT} clients</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="16" y="26" font-size="16" font-weight="600">Images a second at {AT} clients, '
        "ten crops each (auto: as many as it needs)</text>",
    ]
    best = results.best_peer()
    for index, (name, rate) in enumerate(rows):
        top = 44 + ROW * index
        middle, length = top + ROW / 2 - 4, WIDTH * rate.median / most
        low, high = (LEFT + WIDTH * value / most for value in (rate.low, rate.high))
        colour = PEERS if name in results.peers else OURS
        ratio = f" ({rate.median / best[1]:.1f}x)" if best and name not in results.peers else ""
        parts += [
            f'<text x="{LEFT - 10}" y="{middle + 4}" text-anchor="end">{_short(results, name)}</text>',
            f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="{ROW - 10}" rx="2" fill="{colour}"/>',
            f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8" '
            'stroke="#222" fill="none"/>',
            f'<text x="{max(high, LEFT + length) + 8:.1f}" y="{middle + 4}">{rate.median:.1f}{ratio}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _short(results: Results, name: str) -> str:
    return escape(results.titles[name].split(", plain def")[0].removesuffix(", stock export"))
