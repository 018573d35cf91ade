"""Curves: as text in the terminal, and as pictures that are readable on a light and on a dark page."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

from loopctl.errors import UsageError, one_line

BLOCKS = " ▁▂▃▄▅▆▇█"
# Colours that the colour-blind tell apart, after Okabe and Ito, and grey: each has a contrast of 3 or more with a white
# page and with a dark one. Where there are more curves than colours, dashes tell them apart; in black and white, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#C46BA0")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)), (0, (8, 2, 2, 2, 2, 2)))
GREY = "#808080"
STYLE: Any = {
    "svg.hashsalt": "loopctl",          # with it and without a date, the same picture has the same bytes
    "svg.fonttype": "none", "savefig.transparent": True, "figure.dpi": 120,
    "text.color": GREY, "axes.edgecolor": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "axes.facecolor": "none", "figure.facecolor": "none", "font.size": 10, "lines.linewidth": 1.8,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}


def bars(values: list[float], caption: str, width: int | None = None, height: int = 12) -> str:
    """Values from 0 to their largest as filled columns, with that on the axis and `caption` below.

    width: the columns; as many as the terminal has room for if left out, at most 72
    """
    width = width or max(8, min(72, get_terminal_size((84, 24)).columns - 12))
    columns = [values[index * len(values) // width] for index in range(width)]
    top = max(values) or 1.0
    filled = [round(value / top * height * 8) for value in columns]
    lines = ["".join(BLOCKS[min(8, max(0, eighths - 8 * row))] for eighths in filled) for row in range(height)]
    labels = {height - 1: f"{top:.3g}", 0: "0"}
    rows = [f"{labels.get(row, ''):>9} │{lines[row].rstrip()}" for row in reversed(range(height))]
    return "\n".join([*rows, f"{'':>9} └{'─' * width}", f"{'':>11}{caption}"])


@contextmanager
def picture(out: Path, width: float = 7.0, height: float = 3.6) -> Iterator[Any]:
    """Give a matplotlib figure to draw on, then write it to `out`, as the kind that its ending says.

    width, height: in inches

    Raises UsageError where there is no matplotlib, and where it cannot be written; then nothing is left.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("it needs matplotlib; install it with: pip install 'loopctl[plot]'") from None
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        drawing = BytesIO()                 # so that of one that fails nothing is left
        kind = out.suffix[1:].lower()
        undated = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}
        try:
            figure.savefig(drawing, format=kind, metadata=undated.get(kind))
            out.write_bytes(drawing.getvalue())
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"{out} cannot be written: {one_line(error)}") from error


def stroke(number: int) -> dict[str, Any]:
    """Colour and dashes of curve `number`, from 0: no two of the first twenty have both in common."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
