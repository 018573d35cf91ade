"""Completion in the shell: names, and after a colon the options of one and their values, without importing torch."""
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ZshComplete,
    add_completion_class,
    split_arg_string,
)

from loopctl.composition.discovery import available, split_head

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def completer(names: Callable[[], list[str]], kind: str = "") -> Completer:
    """Completion of the names that `names` returns and, with a `kind`, of `name:option=value,...`."""
    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        if kind and ":" in incomplete:
            return list(map(CompletionItem, specs(kind, names(), incomplete)))
        return [CompletionItem(name) for name in names() if name.startswith(incomplete)]
    return complete


def specs(kind: str, names: list[str], incomplete: str) -> list[str]:
    """What `incomplete`, a name with a colon and a part of its options, may become."""
    head, text = split_head(incomplete, names)
    known = options(kind, head)
    before, _, item = text.rpartition(",")
    start = incomplete[:len(incomplete) - len(item)]
    key, equals, value = item.partition("=")
    if equals:
        found = [choice for choice in choices(known[key].type) if choice.startswith(value)] if key in known else []
        return [f"{start}{key}={choice}" for choice in found]
    given = [part.partition("=")[0].strip() for part in before.split(",")]
    return [f"{start}{name}=" for name in known if name.startswith(item) and name not in given]


def options(kind: str, head: str) -> dict[str, Any]:
    """The options of what `head` names, or none where its source does not say them."""
    from loopctl.cli import catalogue
    from loopctl.cli.source_reader import SourceReader, Unreadable
    from loopctl.composition.options import plugin_options
    from loopctl.errors import UsageError

    reader = SourceReader()
    module, _, name = head.rpartition(":")
    try:
        if kind == "plugin" and not module:
            module, name = available()[head].module, available()[head].attr
        elif not module:
            module, name = catalogue.places(kind)[head]
        elif module.endswith(".py"):
            module = str(Path(module).resolve())
        if kind == "plugin":
            return plugin_options(reader.class_of(module, name))
        more = catalogue.more_options(kind, reader)
        return catalogue.options_of(kind, head, catalogue.stand_in((module, name), reader), more, reader)
    except (KeyError, UsageError, Unreadable):
        return {}


def choices(hint: Any) -> list[str]:
    """The values of a type that has few, as they are written."""
    if hint is bool:
        return ["true", "false"]
    if get_origin(hint) is Literal:
        return list(map(str, get_args(hint)))
    return [choice for part in get_args(hint) for choice in choices(part)]


class BashWords(BashComplete):
    """Completion in bash, which takes `:` and `=` for the ends of words: the words are read from the whole line."""

    name = "bash"
    source_template = BashComplete.source_template.replace(
        "$(env ", '$(env COMP_LINE="${COMP_LINE:0:$COMP_POINT}" COMP_WORD="${COMP_WORDS[COMP_CWORD]}" ').replace(
        "    return 0\n", '    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace\n    return 0\n', 1)

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ.get("COMP_LINE")
        if line is None:                            # of a script that an older version wrote
            return super().get_completion_args()
        words = split_arg_string(line)
        incomplete = words.pop() if words and not line[-1].isspace() else ""
        while words and "=" in words[0]:            # variables of the command, as in CUDA_VISIBLE_DEVICES=0 loopctl
            words.pop(0)
        return words[1:], incomplete

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        """The completions without the part of `incomplete` that bash does not replace."""
        found = super().get_completions(args, incomplete)
        value = incomplete.partition("=")[2] if incomplete.startswith("-") and "=" in incomplete else incomplete
        word = os.environ.get("COMP_WORD", incomplete).lstrip("\"'")
        replaced = "" if set(word) <= set(":=") else word
        fixed = len(value) - len(replaced) if value.endswith(replaced) else 0
        return [CompletionItem(item.value[fixed:], item.type, item.help) for item in found]


class ZshWords(ZshComplete):
    """Completion in zsh, without a space after an option that its value follows."""

    name = "zsh"
    source_template = ZshComplete.source_template.replace(
        "        compadd -U -V unsorted -a completions\n",
        "        local -a open=(${(M)completions:#*=}) closed=(${completions:#*=})\n"
        "        compadd -U -S '' -V unsorted -a open\n        compadd -U -V unsorted -a closed\n        return 0\n")


class FishWords(FishComplete):
    """Completion in fish, of values with commas too."""

    name = "fish"
    source_template = FishComplete.source_template.replace('string split ","', 'string split -m 1 ","')


for shell in (BashWords, ZshWords, FishWords):
    add_completion_class(shell)
