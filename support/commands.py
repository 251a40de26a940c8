"""Command lines: errors of one line, checked numbers, and the flags of an estimator."""

import argparse
import inspect
import re
import sys

from support.errors import UserError, first_line


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations, whose errors are one line, plus `hint` for unknown flags."""

    hint = ""

    def __init__(self, **options):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )

    def parse_known_args(self, args=None, namespace=None):
        for arg in sys.argv[1:] if args is None else args:
            if arg.split("=")[-1] == "--":  # which argparse would take for an empty list
                self.error(f"{arg} says nothing")
            if any(
                "\ud800" <= c <= "\udfff" for c in arg
            ):  # as Python keeps bytes that are no UTF-8
                self.error(f"{ascii(arg)} is no valid text")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        if "expected one argument" in message:
            message += (
                "; where it begins with a minus, put an equals sign before: --reward=-jpeg_size"
            )
        if "unrecognized arguments" in message:
            message += self.hint
        self.exit(2, f"{self.prog}: {first_line(message)}\n")


def number(kind, low, high=10**9):
    """An argparse type: an int or float within [low, high], of at most 20 characters."""

    def parse(text):
        if not re.fullmatch(r"[-+0-9.eE]{1,20}", text):
            raise ValueError(text)
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


def size(text):
    """An argparse type: the size of an image in pixels, a side or width x height."""
    if not re.fullmatch(r"[1-9][0-9]{1,3}(x[1-9][0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text} is not a size as 512 or 768x512")
    return text


def options_of(estimator):
    """The options of an estimator, its arguments after the first four: {name: inspect.Parameter}.

    UserError if it does not take those four, or an option has no default, of a kind that can be written.
    """
    try:
        parameters = list(inspect.signature(estimator).parameters.items())
    except (TypeError, ValueError):  # of some functions that are not Python
        parameters = []
    for name, parameter in parameters[4:]:
        if not isinstance(parameter.default, bool | int | float | str | None):
            raise UserError(
                f"option {name} of an estimator must have a number, a text or None as default"
            )
    if len(parameters) < 4:
        raise UserError("an estimator must take (problem, eps, cond, generator), then its options")
    return dict(parameters[4:])


def add_estimator_arguments(parser, name, estimator, models=()):
    """A flag for each option of an estimator: its type and default, its help from a line "option: text".

    models: options whose default depends on the model.
    """
    group, flags = parser.add_argument_group(f"--estimator {name}"), []
    for option, parameter in options_of(estimator).items():
        text = re.search(rf"^ *{option}: (.*)", inspect.getdoc(estimator) or "", re.MULTILINE)
        default = ": the model's" if option in models else f" {parameter.default}"
        words = f"{text[1] if text else ''} (default{default})".strip().replace("%", "%%")
        flags.append(f"--{option.replace('_', '-')}")
        annotated = (
            kind for kind in (bool, int, float) if kind.__name__ in str(parameter.annotation)
        )
        kind = next(annotated, type(parameter.default))
        if kind is bool:
            group.add_argument(flags[-1], action="store_true", help=words, default=None)
        else:
            read = {int: number(int, 1), float: number(float, 0)}.get(kind, str)
            group.add_argument(flags[-1], type=read, help=words)
    parser.hint = f"; --estimator {name} takes {', '.join(flags) or 'no flags of its own'}"
