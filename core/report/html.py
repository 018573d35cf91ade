"""Self-contained HTML pages: one file that loads nothing, with escaped text, in the reader's light or dark scheme."""
from __future__ import annotations

from collections.abc import Iterable
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

START = '<!DOCTYPE html>\n<html lang="en">\n<!-- written by loopctl -->\n'

# The lines have the colour-blind-safe colours of Okabe and Ito; the third line has the colour of the text.
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --soft: #5a626b; --rule: #dde1e5; --box: #f6f7f9;
  --c0: #0072b2; --c1: #d55e00; --c2: var(--ink); --c3: #009e73; --c4: #cc79a7; --c5: #e69f00; --c6: #56b4e9 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e8eaed; --soft: #a3abb3; --rule: #343a40; --box: #1d2125;
    --c0: #56b4e9; --c1: #e8702a; --c6: #3b8fd0 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.25rem 1rem 4rem; max-width: 84rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25 } h1 + p { margin: .35rem 0 0; color: var(--soft) }
h2 { margin: 2.25rem 0 .6rem; font-size: 1.15rem } h3 { margin: 0; font-size: 1rem }
.charts, .columns { display: grid; gap: 1rem; align-items: start }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)) }
.columns { gap: 0 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
.columns > section, figure { min-width: 0 }
figure { margin: 0; padding: .8rem; background: var(--box); border: 1px solid var(--rule); border-radius: 6px }
figcaption { display: flex; flex-wrap: wrap; gap: .1rem 1rem; align-items: baseline; justify-content: space-between }
.legend { display: flex; flex-wrap: wrap; gap: 0 .9rem; margin: 0; padding: 0; list-style: none; font-size: .85rem }
.legend svg { width: 30px; height: 10px; margin-right: .35rem }
.plot { position: relative; margin-top: .4rem; touch-action: pan-y }
.chart { display: block; width: 100%; height: auto; pointer-events: none }
.chart text { font-size: 12px; fill: var(--soft) } .chart .x { text-anchor: middle } .chart .y { text-anchor: end }
.chart path, polyline { fill: none; stroke-linejoin: round } polyline { stroke: var(--c); stroke-width: 2 }
.grid { stroke: var(--rule) } .axis, .tick, .cursor { stroke: var(--soft) }
.chart .mark, .mark { fill: var(--box); stroke: var(--c); stroke-width: 1.6 }
.line0 { --c: var(--c0) } .line1 { --c: var(--c1) } .line2 { --c: var(--c2) } .line3 { --c: var(--c3) }
.line4 { --c: var(--c4) } .line5 { --c: var(--c5) } .line6 { --c: var(--c6) }
.readout { position: absolute; z-index: 1; top: 10%; padding: .3rem .55rem; max-width: 75%; pointer-events: none;
  white-space: pre-wrap; font-size: .8rem; line-height: 1.35; font-variant-numeric: tabular-nums;
  background: var(--paper);
  border: 1px solid var(--rule); border-radius: 4px }
details { margin-top: .4rem; font-size: .85rem } summary { cursor: pointer; color: var(--soft) }
.scroll { overflow: auto } figure .scroll { max-height: 20rem } pre { margin: 0; font-size: .8rem; line-height: 1.4 }
pre, code { font-family: ui-monospace, Menlo, Consolas, monospace; overflow-wrap: normal }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule) }
thead th { position: sticky; top: 0; background: var(--paper); white-space: nowrap }
figure thead th { background: var(--box) }
tbody th { font-weight: 500 } .wide td { overflow-wrap: anywhere; min-width: 8rem }
.numbers th:first-child { overflow-wrap: anywhere; min-width: 8rem }
.numbers :is(th, td):not(:first-child) { text-align: right; white-space: nowrap }
.confusion td { padding: .1rem .2rem } .confusion td span { display: block; padding: .15rem .45rem; border-radius: 3px;
  background: color-mix(in srgb, var(--c) calc(var(--part) * 65%), transparent) }
.confusion .right { --c: var(--c0) } .confusion .wrong { --c: var(--c1) }
.mistakes { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)) }
.mistakes img { display: block; width: 8rem; margin: 0 auto .5rem; image-rendering: pixelated }
.mistakes figcaption { display: block; font-size: .85rem } .mistakes b { display: block }
.results td { min-width: 5.5rem } .results tbody th { min-width: 7rem; overflow-wrap: anywhere }
.layers :is(th, td):nth-child(n+4):nth-child(-n+6) { text-align: right; white-space: nowrap }
.layers tbody :is(th, td), .wide td { white-space: pre-wrap } .layers tbody th { white-space: pre }
@media (max-width: 40rem) {
  .stacked thead { display: none } .stacked, .stacked :is(tbody, tr, th, td) { display: block }
  .stacked tr { padding: .3rem 0; border-bottom: 1px solid var(--rule) }
  .stacked tbody th, .stacked td { padding: .1rem 0; border: 0 } .stacked td:empty { display: none }
  .stacked td::before { content: attr(data-of) ": "; color: var(--soft) } }
@media print { body { max-width: none } figure { break-inside: avoid } }
"""

# Shows the values of the epoch nearest to the pointer; `data-at` holds the x coordinate and the text of each epoch.
SCRIPT = """
for (const plot of document.querySelectorAll(".plot")) {
  const svg = plot.firstChild, cursor = svg.querySelector(".cursor"), readout = plot.lastChild
  const at = JSON.parse(svg.dataset.at)
  const hide = () => { readout.hidden = true; cursor.setAttribute("visibility", "hidden") }
  const show = event => {
    const box = plot.getBoundingClientRect(), width = svg.viewBox.baseVal.width
    const x = (event.clientX - box.left) / box.width * width
    const [place, text] = at.reduce((one, other) => Math.abs(other[0] - x) < Math.abs(one[0] - x) ? other : one)
    cursor.setAttribute("transform", `translate(${place} 0)`)
    cursor.setAttribute("visibility", "visible")
    readout.textContent = text
    readout.hidden = false
    const left = place < width / 2, gap = 2
    readout.style.left = left ? `${place / width * 100 + gap}%` : "auto"
    readout.style.right = left ? "auto" : `${(1 - place / width) * 100 + gap}%`
  }
  plot.addEventListener("pointermove", show)
  plot.addEventListener("pointerdown", show)
  plot.addEventListener("pointerleave", hide)
}
"""

# The page may load nothing; pictures are in it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, subtitle: str, body: Iterable[str]) -> str:
    """Return a complete page; `body` is HTML."""
    return (f'{START}<head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escaped(title)}</title>'
            f'<style>{STYLE}</style></head>\n<body>\n<h1>{escaped(title)}</h1>\n<p>{escaped(subtitle)}</p>\n'
            f'{"".join(body)}\n<script>{SCRIPT}</script>\n</body>\n</html>\n')


def is_report(file: Path) -> bool:
    """Whether `file` is a page that `page` made."""
    with file.open("rb") as stream:
        return stream.read(len(START)) == START.encode()


def write(content: str, file: Path) -> None:
    """Write a page as UTF-8; a surrogate, which UTF-8 cannot encode, is written as an escape."""
    file.write_text(content, encoding="utf-8", errors="backslashreplace", newline="\n")


class Markup(str):
    """Text that is HTML already and is not escaped again."""


def escaped(value: Any) -> str:
    """Return `value` as text with HTML's special characters escaped."""
    return value if isinstance(value, Markup) else escape(str(value))


def breaking(text: str) -> Markup:
    """Return text as HTML in which a line may break after a comma."""
    return Markup(escaped(text).replace(",", ",<wbr>"))


def section(title: str, *content: str) -> str:
    """Return a section of the page with a heading; `content` is HTML."""
    return f"<section><h2>{escaped(title)}</h2>\n{''.join(content)}</section>\n"


def table(header: Iterable[Any], rows: Iterable[Iterable[Any]], kind: str = "wide") -> str:
    """Return a table as HTML; the first cell of each row is its heading.

    kind: the classes that style it: wide, numbers, results or layers; with stacked, each cell is on a line of its own
        below the heading of its row where the window is narrow, after the heading of its column
    """
    header = list(header)
    of = [f' data-of="{escaped(cell)}"' if "stacked" in kind else "" for cell in header[1:]]
    head = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in header)
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    body = ""
    for first, *cells in rows:
        line = "".join(f"<td{label}>{escaped(cell)}</td>" for cell, label in zip_longest(cells, of, fillvalue=""))
        body += f'<tr><th scope="row">{escaped(first)}</th>{line}</tr>\n'
    return f'<div class="scroll" tabindex="0"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def verbatim(text: str) -> str:
    """Return preformatted text as HTML."""
    return f'<div class="scroll" tabindex="0"><pre>{escaped(text)}</pre></div>'
