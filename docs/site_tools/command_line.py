"""The command line as Markdown, from the typer app itself: every command with its arguments and options."""

from __future__ import annotations

import re

import typer

from rlvr_fast.cli import app
from site_tools.markdown import row

PROGRAM = "rlvr-fast"
OPTION = re.compile(r"(?<![\w`-])(--[a-z][\w-]*)")


def commands() -> dict[str, typer.core.TyperCommand]:
    """Every command by the words that call it, such as "simulate collapse"."""
    found: dict[str, typer.core.TyperCommand] = {}

    def walk(group, words: tuple[str, ...]) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                walk(command, (*words, name))
            else:
                found[" ".join((*words, name))] = command

    walk(typer.main.get_command(app), ())
    return found


def check(words: list[str]) -> None:
    """Parse the words of a command line without running it.

    Raises:
        ValueError: for a command, option or number of arguments that the program does not have.
    """
    known = commands()
    name = next((name for name in known if words[:len(name.split())] == name.split()), None)
    if name is None:
        raise ValueError(f"{PROGRAM} has no command {' '.join(words[:2])!r}")
    command = known[name]
    try:
        command.make_context(name, list(words[len(name.split()):]))
    except Exception as error:  # typer carries a click of its own, or uses the installed one
        raise ValueError(f"{PROGRAM} {' '.join(words)}: {getattr(error, 'message', error)}") from error


def reference() -> str:
    """All commands as Markdown sections."""
    return "\n".join(line for name, command in commands().items() for line in _section(name, command))


def _section(name: str, command: typer.core.TyperCommand) -> list[str]:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    usage = " ".join([PROGRAM, name, *(_placeholder(one) for one in arguments), *(["[OPTIONS]"] if options else [])])
    lines = [f"## `{PROGRAM} {name}`", "", OPTION.sub(r"`\1`", command.help or ""), "",
             "```console", f"$ {usage}", "```", ""]
    if arguments or options:
        lines += ["| | default | |", "|---|---|---|", *map(_row, (*arguments, *options)), ""]
    return lines


def _placeholder(argument) -> str:
    name = argument.name.upper()
    return name if argument.required else f"[{name}]"


def _row(one) -> str:
    name = f"`{_placeholder(one)}`" if one.param_type_name == "argument" else ", ".join(f"`{opt}`" for opt in one.opts)
    default = "required" if one.required else "" if one.default is None or one.default is False else f"`{one.default}`"
    return row(name, default, OPTION.sub(r"`\1`", one.help or ""))
