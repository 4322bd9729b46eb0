"""What a run learns from: reads lists, class folders and label maps, says what is odd in them, compares them
with a checkpoint's. Begin with `open_sources`; `read_list` describes the format of a list.
"""

import argparse
import hashlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import data
from data import FileDataset, FileList
from runtime.distributed import say

RECIPE = {'video': 128, 'image': 680}  # samples of a step of the published recipe, on 8 GPUs
SYSTEM = ('.', '@', '$', '__')  # how folders begin that systems make: @eaDir, $RECYCLE.BIN, __MACOSX
VIDEO_ENDINGS = tuple('.mp4 .mkv .webm .avi .mov .m4v .mpg .mpeg .ts .flv .wmv .3gp .ogv .gif'.split())


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
        sources.append(open_source(args, 'video', 'val', data.VideoDataset))
    if not args.video_only:
        sources.append(open_source(args, 'image', 'image_val', data.ImageDataset))
    return sources


def open_source(args: argparse.Namespace, name: str, val: str, kind: type[FileDataset]) -> Source:
    """The source of --NAME-list, --NAME-root, --NAME-labels and --NAMEs-per-gpu, validated on --VAL-list and
    --VAL-root."""
    list_file, label_map = getattr(args, f'{name}_list'), getattr(args, f'{name}_labels')
    val_list, videos = getattr(args, f'{val}_list'), kind is data.VideoDataset
    by_folder = os.path.isdir(list_file) and not label_map  # class folders number the classes
    per_gpu = getattr(args, f'{name}s_per_gpu')
    if per_gpu is None:
        per_gpu = max(round(args.videos_per_gpu * 85 / 16), 2)
    if per_gpu == 1:
        raise ValueError(f'--{name}s-per-gpu: a batch of 1 cannot be normalized by its own statistics')

    labels = None
    if by_folder:
        labels = class_names(list_file)
    elif label_map:
        labels = read_label_map(label_map)
    files = open_list(list_file, getattr(args, f'{name}_root'), name, labels, videos)
    names = labels if labels else [f'class {i}' for i in range(files.labels.max() + 1)]
    say_classes(files, name, list_file, names)

    options = {'size': args.size}
    if videos:
        options |= {'clip_len': args.clip_len, 'frame_interval': args.frame_interval}
    augmentation = {'seed': args.seed, 'flip': not args.no_flip, 'min_area': args.min_area}
    train_set, val_set = kind(files, 'train', **augmentation, **options), None
    if val_list and not args.no_validate:
        val_by_folder = os.path.isdir(val_list)
        if val_by_folder and not labels:
            raise ValueError(
                f'{val_list}: class folders cannot be matched with the numbers in {list_file}; '
                f'--{name}-labels takes a file with their names'
            )
        val_files = open_list(val_list, getattr(args, f'{val}_root'), val, names, videos)
        val_set = kind(val_files, 'val', **options)
        if by_folder and not val_by_folder:
            say(f'{val_list}: taking label 0 as {labels[0]!r} and so on, in the order of the class folders')
    return Source(name, labels, len(names), train_set, val_set, per_gpu)


def open_list(list_file: str, root: str, prefix: str, names: list[str] | None, videos: bool) -> FileList:
    """The samples of --PREFIX-list and --PREFIX-root; `names` are the classes, if they are known."""
    flag = f'--{prefix.replace("_", "-")}'
    if not os.path.exists(list_file):
        raise FileNotFoundError(
            f'{list_file}: no such list or folder of class folders ({flag}-list); `python train.py --demo` '
            'makes a small set of its own'
        )
    files = read_list(list_file, root, None, videos, names)
    check_there(files, list_file, f'{flag}-root')
    return files


def check_there(files: FileList, list_file: str, flag: str) -> None:
    """Raise FileNotFoundError if none of ten files spread over the list exists; `flag` names their folder."""
    spread = [files.path(i) for i in range(0, len(files), math.ceil(len(files) / 10))]
    if any(os.path.exists(path) for path in spread):
        return
    first, stem = spread[0], os.path.splitext(spread[0])[0]
    if os.path.isdir(stem):
        raise FileNotFoundError(
            f'{stem}: a folder, perhaps of frames; `ffmpeg -framerate 30 -i {stem}/img_%05d.jpg {first}` '
            'makes a video of it'
        )
    raise FileNotFoundError(
        f'{first}: no such file, nor {len(spread) - 1} others from all over {list_file}; {flag} names the '
        f'folder that their paths start from, now {files.root!r}'
    )


def say_classes(files: FileList, name: str, list_file: str, names: list[str]) -> None:
    """Say how many samples a training list has, and its smallest and largest class. ValueError if nothing
    can be learned from it."""
    counts = np.bincount(files.labels, minlength=len(names))
    if np.count_nonzero(counts) < 2:
        raise ValueError(f'{list_file}: all {len(files)} {name}s are of one class, which teaches nothing')
    by_size = counts.argsort(kind='stable')
    least, most = (f'{names[i]} ({counts[i]})' for i in (by_size[0], by_size[-1]))
    say(f'{list_file}: {len(files)} {name}s of {len(names)} classes, from {least} to {most}')
    if 0 in counts:
        say(f'{list_file}: {np.count_nonzero(counts == 0)} of the {len(names)} classes have no {name}s')


# What has changed since a checkpoint ----------------------------------------------------------------------


def fingerprints(source: Source) -> list[list[str] | None]:
    """Of the training and the validation set: a digest of the names, and one of their labels."""
    digests = [None, None]
    for i, dataset in enumerate((source.train, source.val)):
        if dataset:
            arrays = dataset.files.paths, dataset.files.labels
            digests[i] = [hashlib.sha256(array.tobytes()).hexdigest() for array in arrays]
    return digests


def compare_data(saved: dict, args: argparse.Namespace, sources: list[Source], path: str) -> None:
    """Say which lists have changed since a checkpoint. ValueError if its network does not fit, or if its
    labels would change their meaning."""
    anew = 'another --work-dir starts a new run, and --init takes these weights'
    for key in ('layers', 'width', 'video_only', 'image_only', 'freeze'):
        flag, was, now = key.replace('_', '-'), saved['settings'].get(key, False), getattr(args, key)
        if was != now:
            raise ValueError(f'{path}: --{flag} was {was} there and is {now} now; {anew}')
    for source in sources:
        name, before = source.name, saved.get(f'{source.name}_labels')
        if before and source.labels:
            for label, (was, new) in enumerate(zip(before, source.labels)):
                if was != new:
                    change = f'{name} label {label} was {was!r} there and is {new!r} now'
                    raise ValueError(f'{path}: {change}; {anew}')
        if name not in saved['lists']:
            raise ValueError(f'{path}: never learned from {name}s; {anew}')
        (old_paths, old_labels), (paths, labels) = saved['lists'][name][0], fingerprints(source)[0]
        if paths == old_paths and labels != old_labels:
            raise ValueError(f'{path}: the same {name}s have other labels now than when it was saved; {anew}')
        if paths != old_paths:
            say(f'changed since the checkpoint: the list of training {name}s')


# Lists, class folders and label maps ----------------------------------------------------------------------

LAST_NUMBER = re.compile(r'(.*[^\s,])[\s,]+(-?\d+)')  # what stands before it, and a whole number


def read_lines(path: str) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of a text file that are not blank; bytes that are not UTF-8 are kept."""
    if os.path.exists(path) and not os.path.isfile(path):  # a FIFO would wait, a device never end
        raise ValueError(f'{path}: not a regular file')
    with open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
        for number, line in enumerate(file, 1):
            if '\0' in line:
                raise ValueError(f'{path}:{number}: not text in UTF-8; save the file as that')
            if line.strip():
                yield number, line.strip()


def read_list(
    list_file: str,
    root: str = '',
    num_classes: int | None = None,
    videos: bool = False,
    names: list[str] | None = None,
) -> FileList:
    """Read lines of `path label`, separated by spaces, tabs or a comma, or a folder of class folders, see
    `read_folder`. Paths are below `root` and may contain spaces.

    With `videos`, all lines can have the form `path num_frames label` instead, and names without an ending,
    as in the Kinetics lists, get `.mp4`. ValueError names a file and line in neither form, or whose label is
    out of range.
    """
    if os.path.isdir(list_file):
        return read_folder(list_file, videos, names)
    if names:
        num_classes = len(names)
    counts, form = (1,), '"path label", as in "jump/1.mp4 0"'
    if videos:
        counts, form = (1, 2), f'{form}, or "path num_frames label" in every line'
    paths, numbers = [], []
    for line, text in read_lines(list_file):
        path, found = text, []
        match = LAST_NUMBER.fullmatch(path)
        while match and len(found) < 3:  # three are too many
            path, found = match[1], [int(match[2]), *found]
            match = LAST_NUMBER.fullmatch(path)
        numbers.append(found)
        if len(found) not in counts or len(found) != len(numbers[0]) or text.startswith('"'):
            raise ValueError(f'{list_file}:{line}: expected {form}; found {text[:100]!r}')
        label = found[-1]
        if label < 0 or num_classes and label >= num_classes:
            known = f', 0 to {num_classes - 1}' if num_classes else ''
            raise ValueError(f'{list_file}:{line}: label {label} is out of range{known}')
        if videos and not os.path.splitext(path)[1]:
            path += '.mp4'
        paths.append(path)
    if not paths:
        raise ValueError(f'{list_file}: no samples in it; expected {form}')
    labels = [found[-1] for found in numbers]
    if len(numbers[0]) == 2 and max(numbers)[0] < 16:
        raise ValueError(f'{list_file}: the first numbers are too small to count frames; expected {form}')
    if not num_classes and max(labels) > 10_000 + 10 * len(labels):
        raise ValueError(f'{list_file}: label {max(labels)} among {len(labels)} samples; labels count from 0')
    return FileList(np.array([*map(os.fsencode, paths)]), np.array(labels, dtype=np.int64), root)


def read_folder(folder: str, videos: bool, names: list[str] | None) -> FileList:
    """The samples of a folder of class folders, files at any depth. `names` number the classes, otherwise
    their order does, see `class_names`."""
    endings, start = VIDEO_ENDINGS if videos else image_endings(), len(os.path.join(folder, ''))
    if not names:
        names = class_names(folder)
    numbers = {name: number for number, name in enumerate(names)}
    paths, labels = [path[start:] for path in files_below(folder, endings)], []
    if not paths or not names:
        raise ValueError(f'{folder}: no CLASS/NAME{endings[0]} or the like in it; a list works too')
    for path in paths:
        name = path.split(os.sep)[0]
        if name not in numbers:
            known = ', '.join(names[:3])
            there = os.path.join(folder, name)
            raise ValueError(f'{there}: not one of the {len(names)} classes, which begin with {known}')
        labels.append(numbers[name])
    return FileList(np.array([*map(os.fsencode, paths)]), np.array(labels, dtype=np.int64), folder)


def class_names(folder: str) -> list[str]:
    """The names of a folder's class folders: by their value if all are numbers, else by the alphabet."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    names = [name for name in names if not name.startswith(SYSTEM)]
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    return names


def image_endings() -> tuple[str, ...]:
    """The endings of the pictures that Pillow reads."""
    others = 'GIF EPS WMF PDF MPEG PALM HDF5 GRIB BUFR'.split()  # a GIF is a video, the rest are not read
    known = Image.registered_extensions().items()
    return '.jpg', '.png', *(ending for ending, kind in known if kind not in others)


def is_image(path: str) -> bool:
    """Whether a file is for ImageDataset, by its ending."""
    return path.lower().endswith(image_endings())


def files_below(folder: str, endings: tuple[str, ...]) -> list[str]:
    """The files below a folder that have one of the endings, sorted. Links are followed. Says what is left
    out, hidden files aside."""
    found, left_out, unreadable = [], [], []
    for parent, folders, names in os.walk(folder, onerror=unreadable.append, followlinks=True):
        above = [Path(parent).resolve(), *(path.resolve() for path in Path(parent).parents)]
        for name in [*folders]:
            in_a_circle = Path(parent, name).resolve() in above
            if in_a_circle or name.startswith(SYSTEM):
                folders.remove(name)
                left_out.append(os.path.join(parent, name))
        for name in names:
            if not name.startswith('.'):
                part = found if name.lower().endswith(endings) else left_out
                part.append(os.path.join(parent, name))
    for error in unreadable:
        say(f'{error.filename}: left out, {error.strerror}')
    if left_out:
        read = ', '.join(endings[:4])
        say(f'{folder}: {len(left_out)} left out, such as {min(left_out)}; what is read ends in {read}, ...')
    return sorted(found, key=lambda path: path.replace(os.sep, '\0'))  # folder by folder


def files_of(folder: str) -> list[str]:
    """The videos and images below a folder. Raises ValueError if there are none."""
    paths = files_below(folder, VIDEO_ENDINGS + image_endings())
    if not paths:
        raise ValueError(f'{folder}: no videos or images below it')
    return paths


def read_label_map(path: str) -> list[str]:
    """Class names from a text file: one a line, or `name index` or `index name` on every line, from 0.

    If the names without their numbers would not be distinct (`level 0` and `level 1`), the numbers belong to
    them. Raises ValueError for anything else.
    """
    wanted = 'expected one class name a line, or "name index" on every line, counted from 0'
    lines = dict(read_lines(path))
    rows = [*lines.values()]
    if [*lines] != [*range(1, len(rows) + 1)]:
        raise ValueError(f'{path}: an empty line stands among the class names')
    if not rows or rows[0].startswith(('{', '["', '#')) or rows[0] == '[':
        raise ValueError(f'{path}: no list of class names; {wanted}')
    for order in (r'(?P<name>.+?)[\s,]+(?P<index>\d+)', r'(?P<index>\d+)[\s,]+(?P<name>.+)'):
        matches = [match for match in (re.fullmatch(order, text) for text in rows) if match]
        if len(matches) < max(len(rows) - 1, 2):  # names, a few of which have a number
            continue
        numbers, names = [int(match['index']) for match in matches], [match['name'] for match in matches]
        # complete: 0 to N - 1, each once. distinct: the names differ without their numbers.
        complete, distinct = sorted(numbers) == [*range(len(rows))], len({*names}) == len(names)
        if complete and distinct:
            return [name for _, name in sorted(zip(numbers, names))]
        if distinct or complete and numbers != sorted(numbers):  # numbers from 1, or names out of order?
            raise ValueError(f'{path}: its lines are not numbered 0 to {len(rows) - 1}; {wanted}')
    if len({*rows}) < len(rows):
        raise ValueError(f'{path}: {max(rows, key=rows.count)!r} stands there twice; {wanted}')
    return rows


def published_labels(kind: str, known: int) -> list[str]:
    """Names for a head that came without: of Kinetics-400 or ImageNet if it has their size, else numbers."""
    published = {('video', 400): ('Kinetics-400', 'R3D_18'), ('image', 1000): ('ImageNet', 'ResNet50')}
    if (kind, known) not in published:
        return [f'class {i}' for i in range(known)]
    from torchvision.models import get_weight  # takes seconds to import

    name, weights = published[kind, known]
    say(f'no names of the {known} {kind} classes in the checkpoint: assuming those of {name}')
    return get_weight(f'{weights}_Weights.DEFAULT').meta['categories']
