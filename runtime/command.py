"""What commands share: their command lines, files that are whole or not there, pictures in rows, many files on
all cores. Begin with `Parser`, `whole_file` and `in_parallel`."""

import argparse
import difflib
import errno
import math
import multiprocessing
import os
import re
import signal
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, NoReturn

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import data
from data import one_line
from runtime.distributed import CONTEXT, cores, end_with_parent, say

# Command lines --------------------------------------------------------------------------------------------


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


# Files that are written -----------------------------------------------------------------------------------


@contextmanager
def whole_file(path: str, mode: str = 'wb', **options) -> Iterator[IO]:
    """A file to write that replaces `path` at the end, whole or not at all. OSError names it."""
    beside = path if is_device(path) else f'{path}.part'
    try:
        with open(beside, mode, **options) as file:
            yield file
        os.replace(beside, path)
    except OSError as error:
        if beside != path:
            Path(beside).unlink(missing_ok=True)
        raise OSError(f'{path} cannot be written ({data.one_line(error)})') from None
    say(f'wrote {path}')


def check_writable(*paths: str) -> None:
    for path in paths:
        if path:
            _cw(path)


def _cw(path: str) -> None:
    """Raise OSError if `whole_file` would fail at once."""
    there = path if is_device(path) else os.path.dirname(path) or '.'
    if os.path.isdir(path) or not os.access(there, os.W_OK):
        raise OSError(f'{path}: cannot be written')


def is_device(path: str) -> bool:
    """Whether it is something like /dev/stdout, which cannot be replaced."""
    return os.path.exists(path) and not os.path.isfile(path)


def draw_rows(out: str, rows: Sequence[Iterable[Tensor]], labels: Sequence[str], size: int) -> None:
    """Write a PNG of rows of pictures, each uint8 (3, H, W) and drawn `size` high, a label above each row.

    Short rows stand side by side, as many as fit into 960 pixels. A label takes as many lines as it needs.
    Raises OSError if `out` cannot be written.
    """
    gap, line, font = 2, 16, ImageFont.load_default(12)
    strips = []  # the pictures of a row beside each other
    for row in rows:
        fitted = [data.resize(p, size, max(round(p.shape[-1] * size / p.shape[-2]), 1)) for p in row]
        strip = torch.cat([torch.nn.functional.pad(p, (gap, 0), value=255) for p in fitted], dim=-1)
        strips.append(Image.fromarray(strip.permute(1, 2, 0).contiguous().numpy()))
    cell = max([240, *(strip.width + gap for strip in strips)])
    columns = max(1, min(960 // cell, len(strips)))
    cell = max(cell, 480 // columns)  # a label needs some room
    cells = [(ascii_lines(s, int((cell - 4 * gap) / font.getlength('m'))), p) for s, p in zip(labels, strips)]
    bands = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    tops = [max(len(lines) for lines, _ in band) * line + 2 * gap for band in bands]
    picture = Image.new('RGB', (columns * cell, sum(tops) + len(tops) * (size + 2 * gap)), 'white')
    drawing, y = ImageDraw.Draw(picture), 0
    for top, band in zip(tops, bands):
        for x, (lines, strip) in zip(range(0, picture.width, cell), band):
            drawing.text((x + 2 * gap, y + gap), '\n'.join(lines), 'black', font)
            picture.paste(strip, (x, y + top))
        y += top + size + 2 * gap
    with whole_file(out) as file:
        picture.save(file, format='PNG')


def ascii_lines(text: str, width: int) -> list[str]:
    """A text in lines of at most `width` characters of Pillow's own font. Accents are dropped; anything else
    that it lacks is written like \\u4e2d."""
    text = ''.join(c for c in unicodedata.normalize('NFKD', text) if not unicodedata.combining(c))
    return textwrap.wrap(text.encode('ascii', 'backslashreplace').decode(), width)


# Many files on all cores ----------------------------------------------------------------------------------


def in_parallel(function: Callable, jobs: list[tuple], title: str) -> Iterator[tuple[tuple, str]]:
    """Do the jobs on all cores, with a progress bar, and yield (job, reason) for each, in order.

    `reason` is '' or one line: what function(*job) raised, or that it killed its process. A process has one
    job at a time, so the culprit is known and no other job is lost. Raises OSError on a full disk.
    """
    first, reasons, left, idle, busy = 0, {}, iter(range(len(jobs))), [], {}
    count = min(cores(), 256)  # each process takes three file handles, usually of 1024
    with tqdm(total=len(jobs), desc=title, unit='file', disable=None) as bar:
        try:
            while first < len(jobs):
                while len(busy) < count and (number := next(left, None)) is not None:
                    connection = idle.pop() if idle else start(function)
                    try:
                        connection.send(jobs[number])
                        busy[connection] = number
                    except ConnectionError:  # its process has died meanwhile
                        left = chain([number], left)
                for connection in wait(busy):
                    number = busy.pop(connection)
                    try:
                        reasons[number], is_full = connection.recv()
                        idle.append(connection)
                        if is_full:
                            raise OSError(f'{reasons[number]}; the files that are finished stay')
                    except EOFError:
                        reasons[number] = 'its process died: a decoder crash, or out of memory'
                    except ConnectionResetError:  # it died before it had read the job
                        left = chain([number], left)
                    bar.update(number in reasons)
                while first in reasons:
                    yield jobs[first], reasons.pop(first)
                    first += 1
        finally:
            for process in multiprocessing.active_children():  # whether idle or in the middle of a file
                process.kill()
                process.join()


def start(function: Callable) -> Connection:
    """Start a process that does the jobs it is sent, and return the connection to it."""
    here, there = multiprocessing.Pipe()
    process, signals = CONTEXT.Process(target=work, args=(function, there), daemon=True), []
    before = signal.signal(signal.SIGINT, lambda *_: signals.append(_))  # Ctrl-C is for this process alone
    process.start()
    signal.signal(signal.SIGINT, before)
    for _ in signals:
        signal.raise_signal(signal.SIGINT)
    there.close()
    return here


def work(function: Callable, connection: Connection) -> None:
    """Answer each job with ('' or why it failed, whether the disk is full); end with the parent."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    while True:
        job, answer = connection.recv(), ('', False)
        try:
            function(*job)
        except Exception as error:  # damaged files make decoders raise anything
            full = getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
            answer = str(error) if full else one_line(error), full
        connection.send(answer)
