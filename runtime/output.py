"""What commands write: files that are whole or not there, and pictures in rows with labels."""

import os
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import data
from runtime.distributed import show


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
    show(f'wrote {path}')


def check_writable(path: str) -> None:
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
