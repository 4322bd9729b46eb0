"""What commands share: their command lines, files that are whole or not there, pictures in rows, many files
on all cores. Begin with `Parser`, `whole_file` and `in_parallel`."""

import argparse
import errno
import gc
import math
import multiprocessing
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path
from typing import IO, NoReturn

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import data
from runtime.distributed import CONTEXT, cores, end_with_parent, say

# Command lines --------------------------------------------------------------------------------------------


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite int or float of at least `low`, or `above` it, and below `high`."""
    wanted = f'a whole number of at least {low}' if kind is int else f'a number of at least {low}'
    if above:
        wanted = f'a number above {low}'
    if high < math.inf:
        wanted += f', below {high}'

    def parse(text: str) -> float:
        with suppress(ValueError):
            value = kind(text)
            if low <= value < high and not (above and value == low):
                return value
        raise argparse.ArgumentTypeError(f'{text!r} is not {wanted}')

    return parse


class Parser(argparse.ArgumentParser):
    """Parses a command line. The help is the program's docstring as it is written; a mistake is one line."""

    def __init__(self, doc: str, **options):
        description, _, epilog = doc.partition('\n\n')
        layout = {'formatter_class': argparse.RawDescriptionHelpFormatter}
        super().__init__(description=description, epilog=epilog, **layout, **options)

    def flags(self, title: str) -> Callable:
        """A function that adds a flag, with a line of help, to a group of its own."""
        group = self.add_argument_group(title)

        def add(flag: str, reason: str, **options) -> None:
            if 'default' in options:
                reason += ' (default: %(default)s)'
            group.add_argument(flag, help=reason, **options)

        return add

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: {message} (--help lists all flags)\n')


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
        raise OSError(f'{path} cannot be written ({data.one_line(error)})') from None
    finally:
        if beside != path:
            Path(beside).unlink(missing_ok=True)
    say(f'wrote {path}')


def check_writable(*paths: str | None) -> None:
    """Raise OSError if `whole_file` would fail at once for one of the paths, or if two are one file."""
    seen = set()
    for path in filter(None, paths):
        there = path if is_device(path) else os.path.dirname(path) or '.'
        if os.path.isdir(path) or not os.access(there, os.W_OK):
            raise OSError(f'{path}: cannot be written')
        if os.path.realpath(path) in seen:
            raise OSError(f'{path}: two outputs of one name')
        seen.add(os.path.realpath(path))


def is_device(path: str) -> bool:
    """Whether it is something like /dev/stdout, which cannot be replaced."""
    return os.path.exists(path) and not os.path.isfile(path)


def draw_rows(out: str, rows: Sequence[Tensor], titles: Sequence[str], size: int) -> None:
    """Write a PNG of rows of pictures, each uint8 (N, 3, H, W) and drawn `size` high, a title above each row.
    OSError if it cannot be written."""
    gap, line, font = 4, 16, ImageFont.load_default(12)
    strips = []  # the pictures of a row beside each other
    for row in rows:
        row = data.resize(row, size, max(round(row.shape[-1] * size / row.shape[-2]), 1))
        strip = torch.cat([*F.pad(row, (gap, 0), value=255)], dim=-1)
        strips.append(Image.fromarray(strip.permute(1, 2, 0).contiguous().numpy()))
    width = max(640, *(strip.width + gap for strip in strips))
    # The font has Latin letters only; lines of 8 pixels a character fit.
    texts = [textwrap.wrap(text.encode('ascii', 'backslashreplace').decode(), width // 8) for text in titles]
    height = sum(line * len(lines) + size + 3 * gap for lines in texts)
    picture, y = Image.new('RGB', (width, height), 'white'), 0
    for lines, strip in zip(texts, strips):
        ImageDraw.Draw(picture).text((gap, y + gap), '\n'.join(lines), 'black', font)
        picture.paste(strip, (0, y + line * len(lines) + 2 * gap))
        y += line * len(lines) + size + 3 * gap
    with whole_file(out) as file:
        picture.save(file, format='PNG')


# Many files on all cores ----------------------------------------------------------------------------------


def in_parallel(function: Callable, jobs: list[tuple], title: str) -> Iterator[tuple[tuple, str]]:
    """Do the jobs on all cores, with a progress bar, and yield (job, reason) for each, in order.

    `reason` is '' or one line: what function(*job) raised, or that it killed its process; no other job is
    lost by that. Raises OSError on a full disk.
    """
    count, said = cores(), time.monotonic()
    with tqdm(total=len(jobs), desc=title, unit='file', disable=None) as bar:
        for start in range(0, len(jobs), 64 * count):
            part = jobs[start : start + 64 * count]
            for reason, job in zip(reasons(function, part, count), part):
                bar.update()
                if bar.disable and time.monotonic() > said + 60:  # no terminal: a line a minute
                    said = time.monotonic()
                    say(f'{title}, {len(jobs)} files: has come to {job[0]}', sys.stderr)
                yield job, reason


def reasons(function: Callable, jobs: list[tuple], count: int) -> Iterator[str]:
    """The reason of each job, from `count` processes. One that dies takes the others with it, and nobody
    knows whose job it had, so those left are done again, each alone."""
    done = 0
    with pool_of(count) as pool, suppress(BrokenProcessPool):
        for reason in pool.map(attempt, repeat(function), jobs):
            done += 1
            yield reason
    if not done and len(jobs) == 1:
        yield 'its process died: a decoder crash, or out of memory'
    else:
        for job in jobs[done:]:
            yield from reasons(function, [job], 1)


@contextmanager
def pool_of(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are killed at the end, even in the middle of a job."""
    pool = ProcessPoolExecutor(count, CONTEXT, begin_process)
    # Ctrl-C is for the main process alone. Forked ones inherit that it is held back.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    pool.submit(os.getpid)  # forks them
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    try:
        yield pool
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        pool.shutdown(cancel_futures=True)


def begin_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for those that are spawned
    end_with_parent()
    torch.set_num_threads(1)
    gc.freeze()  # what is there already need not be looked at after each job


def attempt(function: Callable, job: tuple) -> str:
    """'' or why the job failed, in one line. Raises OSError on a full disk."""
    try:
        function(*job)
    except Exception as error:  # damaged files make decoders raise anything
        if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise OSError(f'{error}; the files that are finished stay') from None
        return data.one_line(error)
    finally:
        gc.collect()  # a few large frames may wait for it
    return ''
