"""Kinds of values that the command line takes. Each refuses what click, or Python, would let pass and nobody means."""
from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click

from loopctl.composition.option_types import plain_number

CONTROL = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff]")         # no terminal shows them, and TOML has none


class Whole(click.IntRange):
    name = "whole number"                      # click says: 'x' is not a valid whole number

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(plain(self, value, param, ctx), param, ctx)
        if self.max is None and number >= 2**63:
            self.fail(f"{number} is more than can be counted.", param, ctx)
        return number


class Number(click.types.FloatParamType):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(plain(self, value, param, ctx), param, ctx)


class Text(click.types.StringParamType):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(shown(self, value, param, ctx), param, ctx)


class Devices(click.ParamType):
    """Numbers of devices, such as 0,1."""

    name = "devices"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        numbers = str(value).split(",")
        if not all(re.fullmatch(r"0|[1-9][0-9]{0,2}", number) for number in numbers):
            self.fail(f"{value!r} is no list of devices, such as 0,1.", param, ctx)
        if len(set(numbers)) < len(numbers):
            self.fail(f"{value!r} names a device twice.", param, ctx)
        return str(value)


class Place(click.Path):
    """A file or a folder, there or not."""

    def __init__(self, path_type: type = Path) -> None:
        super().__init__(path_type=path_type)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value).strip():
            self.fail(f"{value!r} is no name; name one, or . for this folder.", param, ctx)
        return super().convert(shown(self, value, param, ctx), param, ctx)


def plain(kind: click.ParamType, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
    """The text of a number as people write it: not 1_000, and not in another alphabet."""
    try:
        return plain_number(value) if isinstance(value, str) else value
    except ValueError:
        kind.fail(f"{value!r} is not a valid {kind.name}.", param, ctx)


def shown(kind: click.ParamType, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
    """Text that can be shown, and written into a run's run.toml."""
    if found := CONTROL.search(os.fspath(value)):
        kind.fail(f"{value!r} has the control character {found[0]!r}; leave it out.", param, ctx)
    return value
