"""Command lines: numbers within bounds, help as the docstring is written, mistakes in one line."""

import argparse
import difflib
import math
import re
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite int or float of at least `low`, or `above` it, and below `high`."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            value = kind(text)
            if low <= value < high and not (above and value == low):
                return value
        wanted = f'a {"whole " * (kind is int)}number {"above" if above else "of at least"} {low}'
        raise argparse.ArgumentTypeError(f'{text!r} is not {wanted}' + f', below {high}' * (high < math.inf))

    return parse


class Parser(argparse.ArgumentParser):
    """Parses a command line. The help is the program's docstring as it is written. A mistake gets one line,
    with the flag that a misspelt one is likely to mean."""

    def __init__(self, doc: str, **options):
        description, _, epilog = doc.partition('\n\n')
        layout = {'formatter_class': argparse.RawDescriptionHelpFormatter}
        super().__init__(description=description, epilog=epilog, **layout, **options)

    def error(self, message: str) -> NoReturn:
        misspelt = re.match('unrecognized arguments: (--[^ =]+)', message)
        parsers = [self]  # and those of its commands
        for action in self._actions:
            parsers += action.choices.values() if isinstance(action.choices, dict) else ()
        known = [flag for parser in parsers for flag in parser._option_string_actions]
        meant = difflib.get_close_matches(misspelt[1], known, 1) if misspelt else ()
        hint = f'; did you mean {meant[0]}?' if meant else ''
        self.exit(2, f'{self.prog}: {message}{hint} (--help lists all flags)\n')
