"""Options in groups: `--help` shows each group under a heading, the options that most runs need first."""
from __future__ import annotations

from typing import Any

import click

MAIN = "Options"                # the heading of the first group, and of all options where a command has no groups
OTHER = "Other"                 # of the options without a group, in a command that has groups
LEFT_COLUMN = 26                # characters; a longer option has a line of its own


class GroupedOption(click.Option):
    """An option that `--help` shows in its `group`."""

    def __init__(self, *args: Any, group: str = OTHER, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.group = group

    def get_help_extra(self, ctx: click.Context) -> Any:
        """What follows the help in brackets: the default, without the bounds, which a message names where needed."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra


class GroupedCommand(click.Command):
    """A command whose `--help` shows its options by group, in the order in which the groups first appear."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the groups: the main one first, the options without a group last."""
        rows = [(getattr(param, "group", OTHER), record) for param in self.get_params(ctx)
                if isinstance(param, click.Option) and (record := param.get_help_record(ctx))]
        groups = list(dict.fromkeys([MAIN, *(group for group, _ in rows if group != OTHER), OTHER]))
        if {group for group, _ in rows} == {OTHER}:
            groups, rows = [MAIN], [(MAIN, record) for _, record in rows]
        # All groups have the same width of the left column; click would choose one for each.
        width = max((len(flags) for _, (flags, _) in rows if len(flags) <= LEFT_COLUMN), default=0)
        for group in groups:
            if records := [(flags.ljust(width), text) for of, (flags, text) in rows if of == group]:
                with formatter.section(group):
                    formatter.write_dl(records, col_max=LEFT_COLUMN)
