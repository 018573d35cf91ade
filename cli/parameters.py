"""Types of command-line values. They refuse some that click would accept, such as `1_000` or a control character."""
from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click

from loopctl.composition.option_types import plain_number
from loopctl.data.limits import parse_limit
from loopctl.optim.duration import parse_time

CONTROL = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff]")         # not visible in a terminal, and not allowed in TOML


class IntegerType(click.IntRange):
    """A whole number within bounds; without an upper bound, one below 2**63."""

    name = "whole number"                      # click's message: 'x' is not a valid whole number

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(check_number(self, value, param, ctx), param, ctx)
        if self.max is None and number >= 2**63:
            self.fail(f"{number} is too large; use a number below 2**63.", param, ctx)
        return number


class BatchSizeType(IntegerType):
    """A number of samples, or auto."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else super().convert(value, param, ctx)


class FloatType(click.types.FloatParamType):
    """A number, such as 0.1 or 1e-3."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(check_number(self, value, param, ctx), param, ctx)


class TextType(click.types.StringParamType):
    """Text without control characters."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(check_printable(self, value, param, ctx), param, ctx)


class TimeType(TextType):
    """A time with its unit, such as 90s, 30m, 2h, 1h30m or 1d."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = super().convert(value, param, ctx)
        try:
            parse_time(text)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return text


class LimitType(TextType):
    """A number of batches, or a percentage of them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = super().convert(value, param, ctx)
        try:
            parse_limit(text)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return text


class FlagOrWarnType(click.types.BoolParamType):
    """The value of an option that needs none: true, false, or warn."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            if value in ("warn", ""):
                return value or self.fail("")
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is not warn; pass that, or no value.", param, ctx)


class DevicesType(click.ParamType):
    """Device numbers, such as 0,1."""

    name = "devices"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        numbers = str(value).split(",")
        if not all(re.fullmatch(r"0|[1-9][0-9]{0,2}", number) for number in numbers):
            self.fail(f"{value!r} is not a list of device numbers, such as 0,1.", param, ctx)
        if len(set(numbers)) < len(numbers):
            self.fail(f"{value!r} names a device twice.", param, ctx)
        return str(value)


class PathType(click.Path):
    """The path of a file or a folder, which may not exist yet."""

    def __init__(self, path_type: type = Path) -> None:
        super().__init__(path_type=path_type)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value).strip():
            self.fail(f"{value!r} is not a path; use . for the current folder.", param, ctx)
        return super().convert(check_printable(self, value, param, ctx), param, ctx)


def check_number(kind: click.ParamType, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
    """Return `value`. Refuse text with underscores or non-ASCII digits, which Python would accept as a number."""
    try:
        return plain_number(value) if isinstance(value, str) else value
    except ValueError:
        kind.fail(f"{value!r} is not a valid {kind.name}.", param, ctx)


def check_printable(kind: click.ParamType, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
    """Return `value`. Refuse text that cannot be printed, or written to a run's run.toml."""
    if found := CONTROL.search(os.fspath(value)):
        kind.fail(f"{value!r} contains the control character {found[0]!r}; leave it out.", param, ctx)
    return value
