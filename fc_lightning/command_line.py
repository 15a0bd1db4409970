"""A typed function as a command line: its arguments are the options, its docstring the help.

Errors are one line that names the option, the value, and what is nearest to it.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import docstring_parser
from jsonargparse import ArgumentParser


def run(name: str, function: Callable[..., None], options: list[str]) -> None:
    """Call `function` with what the options say; `--help` prints its docstring and exits.

    An argument `text` is a list of words by position, one of type bool a flag, all others
    are options.

    Raises:
        ValueError: an option that does not exist, is missing, or has a value of another type.
    """
    function(**_parser(name, function).parse_args(options))


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message that names the known word most like this one, if any is."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; the nearest is {near[0]}" if near else ""


class _Help(argparse.HelpFormatter):
    """Help of argparse, with defaults, and without the types of Python."""

    def _get_help_string(self, action: argparse.Action) -> str:
        about = action.help or ""
        if not action.option_strings or action.nargs == 0:
            return about
        if action.required:
            return f"{about} (required)"
        return about if action.default is None else f"{about} (default: %(default)s)"


class _Parser(ArgumentParser):
    """A parser whose errors are one line and an exception, not the usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split())
        if unknown := re.match(r"unrecognized arguments: (-?)(\S+)", message):
            option = (unknown[1] + unknown[2]).partition("=")[0]
            near = nearest(option, self._option_string_actions)
            what = "no option" if unknown[1] else "this is out of place:"
            message = f"{what} {option}{near or '; --help shows what there is'}"
        elif missing := re.match(r"the following arguments are required: (.+)", message):
            message = f"needs --{missing[1].replace(', ', ' and --')}"
        elif refused := re.match(r'Parser key "(\w+)": (.*)value: (.*)', message):
            key, types, value = refused.groups()
            choices = re.search(r"Literal\[(.*?)\]", types)
            number = "a whole number" if "int" in types else "a number"
            message = f"--{key} takes {choices[1] if choices else number}, not {value}"
        raise ValueError(message) from ex


def _parser(name: str, function: Callable[..., Any]) -> _Parser:
    """The command line of a function: its arguments as options, but `text` by position."""
    said = docstring_parser.parse(function.__doc__ or "")
    about = {argument.arg_name: argument.description for argument in said.params}
    parser = _Parser(
        prog=f"python -m fc_lightning {name}",
        description=said.description,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parameters = inspect.signature(function).parameters
    flags = {n for n, parameter in parameters.items() if parameter.annotation == "bool"}
    if "text" in parameters:
        parser.add_argument("text", nargs="*", metavar="TEXT", help=about["text"])
    parser.add_function_arguments(function, as_group=False, skip={*flags, "text"})
    for flag in sorted(flags):
        parser.add_argument(f"--{flag}", action="store_true", help=about[flag])
    return parser
