"""A confusion matrix and the worst mistakes, as HTML."""
from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from io import BytesIO

from loopctl.report.charts import shown
from loopctl.report.html import Markup, escaped, table

MAX_TABLE = 30          # classes; of more, only the pairs that are confused most are shown
MAX_PAIRS = 12


def matrix(counts: list[list[int]], names: list[str]) -> str:
    """Return the matrix as a table, a row per true class, or for many classes the pairs that are confused most."""
    if len(names) > MAX_TABLE:
        return f"<p>Of {len(names)} classes, the pairs that are confused most:</p>{pairs(counts, names)}"
    columns = [sum(row[index] for row in counts) for index in range(len(names))]
    rows: list[list[str]] = []
    for true, (name, row) in enumerate(zip(names, counts, strict=True)):
        cells = [cell(count, sum(row), index == true) for index, count in enumerate(row)]
        rows.append([name, *cells, share(row[true], sum(row))])
    rows.append(["precision", *[share(counts[index][index], total) for index, total in enumerate(columns)], ""])
    return ("<p>A row has the samples of one class, by the class that they were taken for. Recall is the part of the "
            "row that is right, precision that of the column.</p>"
            + table(["true \\ predicted", *names, "recall"], rows, "numbers confusion"))


def cell(count: int, total: int, right: bool) -> Markup:
    """Return a cell of the matrix, coloured by its part of the row; a single mistake is seen too."""
    part = max(count / total, 0.15) if count else 0.0
    return Markup(f'<span class="{"right" if right else "wrong"}" style="--part:{part:.2f}">{count:,}</span>')


def share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else ""


def pairs(counts: list[list[int]], names: list[str]) -> str:
    """Return a table of the pairs of classes that are confused most."""
    found = sorted((-count, true, predicted) for true, row in enumerate(counts) for predicted, count in enumerate(row)
                   if true != predicted and count)[:MAX_PAIRS]
    rows = [[names[true], names[predicted], f"{-count:,}", share(-count, sum(counts[true]))]
            for count, true, predicted in found]
    return table(["true", "taken for", "samples", "of its class"], rows) if rows else "<p>There is none.</p>"


def mistakes(rows: Iterable[tuple[str, str, float, float, str, bytes | None]]) -> str:
    """Return figures of mistakes: of each the true and the predicted class, its loss, the probability of the predicted
    class, which sample it is, and the picture as PNG, or None."""
    figures = ""
    for true, predicted, loss, probability, sample, png in rows:
        text = f"{true} taken for {predicted}"
        image = f'<img src="data:image/png;base64,{b64encode(png).decode()}" alt="{escaped(text)}">' if png else ""
        figures += (f"<figure>{image}<figcaption><b>{escaped(text)}</b> {probability:.0%} sure, loss {shown(loss)}"
                    f"{escaped(sample)}</figcaption></figure>\n")
    return f'<div class="mistakes">{figures}</div>'


def png(pixels: bytes, width: int, height: int, colour: bool) -> bytes:
    """Return an image as PNG; `pixels` are its bytes, row by row, of colour images three per pixel."""
    from PIL import Image

    file = BytesIO()
    Image.frombytes("RGB" if colour else "L", (width, height), pixels).save(file, "PNG")
    return file.getvalue()
