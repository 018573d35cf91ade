"""The learning rate over a run, drawn without training."""
from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from loopctl.cli.train import prepared
from loopctl.compose import blame
from loopctl.errors import UsageError, one_line
from loopctl.rates import curve

BLOCKS = " ▁▂▃▄▅▆▇█"


def drawn(settings: dict[str, Any], out: Path | None) -> str:
    """The curve that the settings make, as text; with `out` also as a picture, of the kind its name says."""
    if out and not out.suffix:
        raise UsageError(f"--out {out}: its ending says what kind of picture it is; say {out}.png or {out}.svg")
    run = prepared(settings)
    with blame(run.hook):
        points = list(curve(run))
    epochs = [step / run.plan()[0] for step, _ in points]
    if out:
        picture(epochs, [rates for _, rates in points], out)
    first = [rates[0] for _, rates in points]
    return chart(first, f"{run.epochs} epochs, {run.planned_steps:,} steps")


def chart(values: list[float], length: str, width: int = 72, height: int = 12) -> str:
    """Values from 0 to their largest as filled columns, with that and `length` on the axes."""
    columns = [values[index * len(values) // width] for index in range(width)]
    top = max(values) or 1.0
    filled = [round(value / top * height * 8) for value in columns]
    lines = ["".join(BLOCKS[min(8, max(0, eighths - 8 * row))] for eighths in filled) for row in range(height)]
    labels = {height - 1: f"{top:.3g}", 0: "0"}
    rows = [f"{labels.get(row, ''):>9} │{lines[row].rstrip()}" for row in reversed(range(height))]
    end = f"start {values[0]:.3g}, end {values[-1]:.3g}; {length}"
    return "\n".join([*rows, f"{'':>9} └{'─' * width}", f"{'':>11}{end}"])


def picture(epochs: list[float], rates: list[list[float]], out: Path) -> None:
    """Write the curve of every parameter group with matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--out needs matplotlib; install it with: pip install 'loopctl[plot]'") from None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="learning rate")
    for number, group in enumerate(zip(*rates, strict=True)):
        axes.plot(epochs, group, label=f"parameter group {number}")
    if len(rates[0]) > 1:
        axes.legend(framealpha=1)
    axes.set_ylim(bottom=0)
    axes.grid(color="0.85")             # not translucent, which not every kind of picture can be
    drawing = BytesIO()                 # so that of one that fails nothing is left
    try:
        figure.savefig(drawing, format=out.suffix[1:].lower())
        out.write_bytes(drawing.getvalue())
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"--out {out} cannot be written: {one_line(error)}") from error
