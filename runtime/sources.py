"""What a run learns from: reads lists, class folders and label maps, says what is odd in them, compares them
with a checkpoint's. Begin with `open_sources`; `read_list` describes the format of a list.
"""

import argparse
import codecs
import hashlib
import io
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

import data
from data import FileDataset, FileList
from runtime.distributed import say

VIDEO_ENDINGS = tuple('.mp4 .mkv .webm .avi .mov .m4v .mpg .mpeg .ts .flv .wmv .3gp .ogv .gif'.split())


def image_endings() -> tuple[str, ...]:
    """The endings of the pictures that Pillow reads."""
    unread = ('.gif', '.eps', '.ps', '.wmf', '.emf', '.pdf', '.mpg', '.mpeg')
    return tuple(ending for ending in Image.registered_extensions() if ending not in unread)


def is_image(path: str) -> bool:
    """Whether a file is for ImageDataset, by its ending."""
    return path.lower().endswith(image_endings())


def fingerprint(files: FileList) -> list[str]:
    """A digest of the names, and one of their labels."""
    return [hashlib.sha256(array.tobytes()).hexdigest() for array in (files.paths, files.labels)]


@dataclass
class Source:
    """One kind of data that the network learns from, with its classes and its share of a batch."""

    name: str  # also of its head
    labels: list[str] | None  # class names
    classes: int
    train: FileDataset
    val: FileDataset | None
    per_gpu: int  # samples in each batch


def open_sources(args: argparse.Namespace) -> list[Source]:
    """What the run learns from. Raises OSError or ValueError if a list cannot be used."""
    sources = []
    if not args.image_only:
        sources.append(open_source(args, 'video', 'val'))
    if not args.video_only:
        sources.append(open_source(args, 'image', 'image_val'))
    return sources


def open_source(args: argparse.Namespace, name: str, val: str) -> Source:
    """The source of --NAME-list, --NAME-root, --NAME-labels and --NAMEs-per-gpu, validated on --VAL-list and
    --VAL-root."""
    per_gpu = getattr(args, f'{name}s_per_gpu') or max(round(args.videos_per_gpu * 85 / 16), 2)
    if per_gpu == 1:
        raise ValueError(f'--{name}s-per-gpu: a batch of 1 cannot be normalized by its own statistics')
    list_file, label_map = getattr(args, f'{name}_list'), getattr(args, f'{name}_labels')
    root, videos = getattr(args, f'{name}_root'), name == 'video'
    labels = None
    if label_map:
        if not os.path.exists(label_map):
            raise FileNotFoundError(f'{label_map}: no such file, given by --{name}-labels')
        labels = read_label_map(label_map)
    elif os.path.isdir(list_file):
        labels = class_names(list_file)
    samples = open_list(list_file, root, name, labels, len(labels) if labels else None, videos)
    classes = len(labels) if labels else int(samples.labels.max()) + 1
    check_classes(samples, name, list_file, labels, classes)
    held_out = None
    if (val_list := getattr(args, f'{val}_list')) and not args.no_validate:
        if not labels and os.path.isdir(val_list):
            raise ValueError(
                f'{val_list}: class folders cannot be matched with the numbers in {list_file}; '
                f'--{name}-labels takes a file with their names'
            )
        held_out = open_list(val_list, getattr(args, f'{val}_root'), val, labels, classes, videos)
        if os.path.isdir(list_file) and not label_map and not os.path.isdir(val_list):
            ends = f'label 0 as {labels[0]!r}, {classes - 1} as {labels[-1]!r}'
            say(f'{val_list}: taking {ends}, in the order of the class folders')
    if name == 'video':
        clip = {'size': args.size, 'clip_len': args.clip_len, 'frame_interval': args.frame_interval}
        train = data.VideoDataset(samples, 'train', seed=args.seed, flip=not args.no_flip, **clip)
        held_out = held_out and data.VideoDataset(held_out, 'val', **clip)
    else:
        purpose = 'ImageDataset' if name == 'image' else name
        train = data.ImageDataset(samples, 'train', args.size, args.seed, not args.no_flip, purpose)
        held_out = held_out and data.ImageDataset(held_out, 'val', args.size)
    return Source(name, labels, classes, train, held_out, per_gpu)


def open_list(
    list_file: str, root: str, prefix: str, labels: list[str] | None, classes: int | None, videos: bool
) -> FileList:
    """The samples of --PREFIX-list and --PREFIX-root."""
    flag = f'--{prefix.replace("_", "-")}'
    if not os.path.exists(list_file):
        without = '`train.py --video-only` does without images; ' if prefix.startswith('image') else ''
        raise FileNotFoundError(
            f'{list_file}: no such list or folder of class folders, seen from {os.getcwd()} '
            f'({flag}-list); {without}the README shows how data is laid out, and `python train.py --demo` '
            'makes a small set of its own'
        )
    samples = read_list(list_file, root, classes, videos, labels)
    check_there(samples, list_file, f'{flag}-root')
    return samples


def check_there(samples: FileList, list_file: str, flag: str) -> None:
    """Raise FileNotFoundError if none of the first files exists; `flag` names their folder."""
    start = [samples.path(i) for i in range(min(10, len(samples)))]
    if not any(os.path.exists(path) for path in start):
        raise FileNotFoundError(
            f'{start[0]}: no such file, nor any other at the start of {list_file}; {flag} names the '
            f'folder that their paths start from, now {samples.root!r}'
        )


def check_classes(
    samples: FileList, name: str, list_file: str, labels: list[str] | None, classes: int
) -> None:
    """Say how many samples of each class a training list has, and what is odd about it; ValueError if nothing
    can be learned from it."""
    counts = np.bincount(samples.labels, minlength=classes)
    if np.count_nonzero(counts) < 2:
        raise ValueError(f'{list_file}: all {len(samples)} {name}s are of one class, which teaches nothing')
    texts = [f'{labels[i] if labels else f"class {i}"} ({count})' for i, count in enumerate(counts)]
    text = f'{len(samples)} {name}s of {classes} classes: {", ".join(texts[:10])}'
    if classes > 10:
        text += f' and {classes - 10} more'
    if counts.min() < counts.max():
        text += f'; from {texts[counts.argmin()]} to {texts[counts.argmax()]}'
    if empty := np.count_nonzero(counts == 0):
        text += f'; classes without {name}s: {empty}'
    if not counts[0] and not labels:
        text += '; labels are expected to count from 0'
    say(f'{list_file}: {text}')


def compare_data(saved: dict, args: argparse.Namespace, sources: list[Source], path: str) -> None:
    """Say which lists have changed since a checkpoint. ValueError if its network does not fit, or if its
    labels would change their meaning."""
    for key in ('layers', 'width', 'video_only', 'image_only', 'freeze'):
        was, now = saved['settings'].get(key, False), getattr(args, key)
        if was != now:
            advice = '' if key in ('layers', 'width') else '; --init starts a new run from its weights'
            flag = f'--{key.replace("_", "-")}'
            raise ValueError(f'{path}: has {flag} {was}, now {now}; --work-dir takes another folder{advice}')
    for source in sources:
        name, before, now = source.name, saved.get(f'{source.name}_labels'), source.labels
        if before and now and before != now:
            same = min(len(before), len(now))
            label = next((i for i in range(same) if before[i] != now[i]), same)
            was, new = (names[label] if label < len(names) else 'none' for names in (before, now))
            raise ValueError(
                f'{path}: {name} label {label} was {was!r} there and is {new!r} now; --init starts a new '
                'run from its weights'
            )
        paths, labels = fingerprint(source.train.files)
        if name not in saved['lists']:
            raise ValueError(f'{path}: never learned from {name}s; --init starts a new run from its weights')
        old_paths, old_labels = saved['lists'][name][0]
        if paths == old_paths and labels != old_labels:
            raise ValueError(
                f'{path}: the same {name}s have other labels now than when it was saved; --init starts a new '
                'run from its weights'
            )
        if paths != old_paths:
            say(f'changed since the checkpoint: the list of training {name}s')


# Lists, class folders and label maps ----------------------------------------------------------------------


HEADER = re.compile(
    r'([\W_]|categor(y|ies)|class|e?s|file|frame|idx?|image|index|label|name|num|path|target|video)+', re.I
)
NOT_DATA = {  # folders that systems put among a user's, besides hidden ones
    '@eadir', '@recycle', '@recently-snapshot', '@tmp', '#recycle', '#snapshot', '$recycle.bin',
    'system volume information', '__macosx', '__pycache__', 'lost+found',
}  # fmt: skip
nfc = partial(unicodedata.normalize, 'NFC')  # a Mac's file system spells an ä with two characters


def read_lines(path: str) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of a text file that are not blank; bytes that are not UTF-8 are kept.

    UTF-16, which PowerShell writes, is recognized by its mark. ValueError for a line that is not text.
    """
    with open(path, 'rb') as file:
        wide = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding = ('utf-16', 'replace') if wide else ('utf-8-sig', 'surrogateescape')
        for number, line in enumerate(io.TextIOWrapper(file, *encoding), 1):
            if '\0' in line:
                raise ValueError(f'{path}:{number}: not text in UTF-8; save the file as that')
            if line.strip():
                yield number, line.strip()


def unquote(text: str) -> str:
    """A field of a CSV file without its quotes; any other text as it is."""
    return text[1:-1].replace('""', '"') if len(text) > 2 and text[0] == text[-1] == '"' else text


def read_list(
    list_file: str,
    root: str = '',
    num_classes: int | None = None,
    videos: bool = False,
    names: list[str] | None = None,
) -> FileList:
    """Read lines of `path label`, separated by spaces, tabs, commas or semicolons. Paths are below `root` and
    may contain spaces; blank lines and a header are skipped.

    With `videos`, the form `path num_frames label` is understood too, and the Kinetics lists' ids, which have
    no ending, get `.mp4`. Raises ValueError, with file and line, if a line has no label, several, or one that
    is negative, not below `num_classes` or, if that is not known, far beyond the sample count.

    Instead of a list it can be a folder of class folders, see `read_folder`; `root` is then ignored.
    """
    if os.path.isdir(list_file):
        return read_folder(list_file, num_classes, videos, names)
    paths, labels, lines, frames, odd = [], [], [], {}, {}
    several = 'several labels; expected "path label"'
    several += ', or "path num_frames label" in every line' * videos
    for number, text in read_lines(list_file):
        match = re.fullmatch(r'(.+?)[\s,;]+("?)(-?\d+)\2', text)
        if not match and not paths and HEADER.fullmatch(text):
            continue
        if not match:
            raise ValueError(
                f'{list_file}:{number}: no label at the end of {text[:100]!r}; a line is a path and '
                'a whole number, as in "jump/1.mp4 0"'
            )
        path, label = match[1], int(match[3])
        if label < 0 or num_classes and label >= num_classes:
            known = f', 0 to {num_classes - 1}' if num_classes else ''
            known += ', as classes are named' if names else ''
            raise ValueError(f'{list_file}:{number}: label {label} is out of range{known}')
        stem = re.sub(r'([\s,;]+("?)\d+\2)+$', '', path) if path[-1] in '"0123456789' else path
        counts, lower = re.findall(r'\d+', path[len(stem) :]), unquote(stem).lower()
        if counts and (videos or lower.endswith(VIDEO_ENDINGS + image_endings())):
            if not videos or len(counts) > 1 or int(counts[0]) == 0:
                raise ValueError(f'{list_file}:{number}: {several}')
            path = stem
        if videos and lower.endswith(VIDEO_ENDINGS):
            frames.setdefault(int(counts[0]) if counts else None, number)
        elif videos and not lower.endswith(image_endings()):
            odd.setdefault(re.search(r'\.[a-z]\w*$|$', lower)[0], []).append(len(paths))
        paths.append(unquote(path))
        labels.append(label)
        lines.append(number)
    if not paths:
        raise ValueError(f'{list_file}: no samples in it; expected lines of "path label"')
    plain = frames.pop(None, None)
    # Two numbers are two labels if not all lines have two, or if all frame counts could be labels.
    if frames and (plain or max(frames) < min(16, max(labels) + 1)):
        doubt = '' if plain else '. Frame counts as small as these look like labels; they can be left out'
        raise ValueError(f'{list_file}:{min(frames.values())}: {several}{doubt}')
    highest = int(np.argmax(labels))
    if not num_classes and labels[highest] > 10_000 + 10 * len(labels):
        raise ValueError(
            f'{list_file}:{lines[highest]}: label {labels[highest]} among {len(labels)} samples; labels '
            'number the classes from 0'
        )
    if '\\' in paths[0] and not os.path.exists(os.path.join(root, paths[0])):  # written on Windows
        paths = [path.replace('\\', '/') for path in paths]
    for ending, places in odd.items():  # a look at a few files tells what the names leave open
        first = [os.path.join(root, paths[i]) for i in places[:10]]
        added = not ending or any(os.path.isfile(f'{path}.mp4') for path in first)
        for i in places if added and not any(map(os.path.isfile, first)) else ():
            paths[i] += '.mp4'
    return FileList(np.array([*map(os.fsencode, paths)]), np.array(labels, dtype=np.int64), root)


def read_folder(folder: str, num_classes: int | None, videos: bool, names: list[str] | None) -> FileList:
    """The samples of a folder of class folders, files at any depth. `names` number the classes, otherwise the
    alphabet does. ValueError for a class folder whose name is not among them, or if there are no files."""
    endings, start = VIDEO_ENDINGS if videos else image_endings(), len(os.path.join(folder, ''))
    if not names:
        names = class_names(folder)
        if num_classes not in (None, len(names)):
            raise ValueError(
                f'{folder}: {len(names)} class folders; only a list can say which of the {num_classes} '
                'classes they are'
            )
        if num_classes:
            say(f'{folder}: the classes have no names, so its folders are numbered in alphabetical order')
    numbers = {nfc(name): number for number, name in enumerate(names)}
    paths = [path[start:] for path in files_below(folder, endings)]
    files = {path: nfc(path.partition(os.sep)[0]) for path in paths if os.sep in path}
    if unknown := sorted(set(files.values()) - numbers.keys()):
        raise ValueError(
            f'{os.path.join(folder, unknown[0])}: not a known class; the {len(names)} trained ones '
            f'are {", ".join(names[:3])}' + ', ...' * (len(names) > 3)
        )
    if not files:
        raise ValueError(
            f'{folder}: no CLASS/NAME{endings[0]} or the like in it; a list of "path label" works too'
        )
    if len(files) < len(paths):
        say(f'{folder}: {len(paths) - len(files)} of {len(paths)} files are in no class folder and left out')
    labels = np.array([numbers[name] for name in files.values()], dtype=np.int64)
    return FileList(np.array([*map(os.fsencode, files)]), labels, folder)


def class_names(folder: str) -> list[str]:
    """The names of a folder's readable class folders, in alphabetical order."""
    folders = [e for e in os.scandir(folder) if os.path.isdir(e) and os.access(e, os.R_OK | os.X_OK)]
    return sorted({nfc(entry.name) for entry in folders if is_data(entry.path)})


def files_below(folder: str, endings: tuple[str, ...]) -> list[str]:
    """The files below a folder that have one of the endings, in alphabetical order. Says what is left out,
    hidden files aside. Links are followed, but not in a circle."""
    found, unreadable = [], []
    for parent, folders, names in os.walk(folder, onerror=unreadable.append, followlinks=True):
        folders[:] = [name for name in folders if is_data(os.path.join(parent, name))]
        found += [os.path.join(parent, name) for name in names if not name.startswith('.')]
    found.sort(key=lambda path: path.replace(os.sep, '\0'))
    files = [path for path in found if path.lower().endswith(endings)]
    for error in unreadable:
        say(f'{error.filename}: left out, {data.one_line(error)}')
    if len(files) < len(found):
        other = next(path for path in found if not path.lower().endswith(endings))
        say(
            f'{folder}: {len(found) - len(files)} of {len(found)} files are left out, such as {other}: its '
            f'ending is none of {", ".join(endings[:4])}, ...'
        )
    return files


def is_data(folder: str) -> bool:
    """Whether a folder is the user's, and not a link to a folder that it is in."""
    name, real = os.path.basename(folder).lower(), os.path.islink(folder) and os.path.realpath(folder)
    circular = real and real in map(os.path.realpath, Path(folder).parents)
    return not (name.startswith('.') or name in NOT_DATA or circular)


def read_label_map(path: str) -> list[str]:
    """Class names from a text file: one per line, or `name index` or `index name` on every line, as in a CSV
    file. A header, and lines that begin with `# `, are skipped.

    If names without their numbers would be the same (`level 0` and `level 1`), the numbers belong to them.
    Raises ValueError, with file and line, for names that are not distinct, and for any other kind of file.
    """
    rows = [row for row in read_lines(path) if not row[1].startswith('# ')]
    expected = 'expected one class name per line, or "name index"'
    at, first = rows[0] if rows else (1, '')
    if re.match(r'[\[{]\s*($|["\'\[{])', first):
        raise ValueError(f'{path}:{at}: looks like JSON; {expected}')
    column = re.compile(r'^"?\d+"?\s*[,;\t]|[,;\t]\s*"?\d+"?$').search
    columns = len(rows) > 1 and all(column(text) for _, text in rows[1:])
    header = HEADER.fullmatch(first) or columns and not column(first)
    rows = rows[1:] if header else rows
    if not rows:
        raise ValueError(f'{path}: no class names in it; {expected}')
    between = r'\s*[,;\t]\s*' if columns else r'[\s,;:]+'
    orders = rf'(?P<name>.+?){between}"?(?P<index>\d+)"?', rf'"?(?P<index>\d+)"?{between}(?P<name>.+)'
    for order in orders:
        found = [(number, re.fullmatch(order, text)) for number, text in rows]
        named = {int(match['index']): (number, match['name']) for number, match in found if match}
        names = [named[i] for i in range(len(rows)) if i in named]
        if len(names) == len(rows) and (columns or header or len({name for _, name in names}) == len(rows)):
            break
    else:
        if columns or header:
            raise ValueError(
                f'{path}:{at}: {first!r} begins a table whose rows are not numbered 0 to {len(rows) - 1}; '
                f'{expected}. If it is a class name, number the lines'
            )
        names = rows
    lines = {}
    for number, name in names:
        if re.search('[\udc80-\udcff]', name):
            raise ValueError(f'{path}:{number}: not text in UTF-8; save the file as that')
        before = lines.setdefault(nfc(unquote(name)), number)
        if before != number:
            raise ValueError(f'{path}:{number}: {name!r} is in line {before} too')
    return list(lines)


def published_labels(kind: str, known: int) -> list[str] | None:
    """The class names of Kinetics-400 or ImageNet, for a head of their size that came without names."""
    published = {('video', 400): ('Kinetics-400', 'R3D_18'), ('image', 1000): ('ImageNet', 'ResNet50')}
    if (kind, known) not in published:
        return None
    from torchvision.models import get_weight  # takes seconds to import

    name, weights = published[kind, known]
    say(f'no names of the {known} {kind} classes in the checkpoint: assuming those of {name}')
    return get_weight(f'{weights}_Weights.DEFAULT').meta['categories']
