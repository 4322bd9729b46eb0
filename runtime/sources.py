"""What a run learns from: lists, class folders and label maps read, what is odd about them said, and compared
with a checkpoint's. Begin with `open_sources`; the format of a list is with `read_list`.
"""

import argparse
import os
import re
from collections.abc import Iterator

import numpy as np

import data
from runtime.distributed import show


def open_sources(args: argparse.Namespace) -> list[data.Source]:
    """What the run learns from. Raises OSError or ValueError where a list is not usable."""
    sources = []
    if not args.image_only:
        sources.append(open_source(args, 'video', 'val'))
    if not args.video_only:
        sources.append(open_source(args, 'image', 'image_val'))
    return sources


def open_source(args: argparse.Namespace, name: str, val: str) -> data.Source:
    """The source of --NAME-list, --NAME-root, --NAME-labels and --NAMEs-per-gpu, validated on --VAL-list and
    --VAL-root."""
    per_gpu = getattr(args, f'{name}s_per_gpu') or max(round(args.videos_per_gpu * 85 / 16), 2)
    if per_gpu == 1:
        raise ValueError(f'--{name}s-per-gpu: a batch of 1 cannot be normalized by its own statistics')
    list_file, label_map = getattr(args, f'{name}_list'), getattr(args, f'{name}_labels')
    labels = None
    if label_map:
        if not os.path.exists(label_map):
            raise FileNotFoundError(f'{label_map}: no such file, given by --{name}-labels')
        labels = read_label_map(label_map)
    elif os.path.isdir(list_file):
        labels = class_names(list_file)
    root, videos = getattr(args, f'{name}_root'), name == 'video'
    samples = open_list(list_file, root, name, labels, len(labels) if labels else None, videos)
    classes = len(labels) if labels else int(samples.labels.max()) + 1
    check_classes(samples, name, list_file, labels, classes)
    held_out = None
    if (val_list := getattr(args, f'{val}_list')) and not args.no_validate:
        held_out = open_list(val_list, getattr(args, f'{val}_root'), val, labels, classes, videos)
    if name == 'video':
        clip = {'size': args.size, 'clip_len': args.clip_len, 'frame_interval': args.frame_interval}
        train = data.VideoDataset(samples, 'train', seed=args.seed, flip=not args.no_flip, **clip)
        held_out = held_out and data.VideoDataset(held_out, 'val', **clip)
    else:
        purpose = 'ImageDataset' if name == 'image' else name
        train = data.ImageDataset(samples, 'train', args.size, args.seed, not args.no_flip, purpose)
        held_out = held_out and data.ImageDataset(held_out, 'val', args.size)
    return data.Source(name, labels, classes, train, held_out, per_gpu)


def open_list(
    list_file: str, root: str, prefix: str, labels: list[str] | None, classes: int | None, videos: bool
) -> data.FileList:
    """The samples of --PREFIX-list and --PREFIX-root."""
    flag = f'--{prefix.replace("_", "-")}'
    if not os.path.exists(list_file):
        raise FileNotFoundError(
            f'{list_file}: no such list or folder of class folders, seen from {os.getcwd()}; expected there '
            f'by {flag}-list; the README shows how data is laid out, --video-only does '
            'without images, and `python train.py --demo` makes a small set of its own'
        )
    samples = read_list(list_file, root, classes, videos, labels)
    check_there(samples, list_file, f'{flag}-root')
    return samples


def check_there(samples: data.FileList, list_file: str, flag: str) -> None:
    """FileNotFoundError where none of the first files is there; `flag` is the one that names their folder."""
    start = [samples.path(i) for i in range(min(10, len(samples)))]
    if not any(os.path.exists(path) for path in start):
        raise FileNotFoundError(
            f'{start[0]}: no such file, nor any other of the first of {list_file}; {flag} names the folder '
            f'that they are below, now {samples.root!r}'
        )


def check_classes(
    samples: data.FileList, name: str, list_file: str, labels: list[str] | None, classes: int
) -> None:
    """Say what is odd about a training list; ValueError where nothing can be learned from it."""
    counts = np.bincount(samples.labels, minlength=classes)
    empty = np.flatnonzero(counts == 0)
    if classes - len(empty) < 2:
        raise ValueError(f'{list_file}: all {len(samples)} {name}s are of one class, which teaches nothing')
    if len(empty):
        first = labels[empty[0]] if labels else f'class {empty[0]}'
        show(
            f'{list_file}: no {name} of {len(empty)} of the {classes} classes, such as {first}'
            + ('; labels are expected to count from 0' if empty[0] == 0 and not labels else '')
        )
    endings = tuple(ending.encode() for ending in data.IMAGE_ENDINGS)
    pictures = sum(path.lower().endswith(endings) for path in samples.paths) if name == 'video' else 0
    if pictures:
        show(f'{list_file}: {pictures} of the {len(samples)} videos are images, each a video of one frame')


def compare_data(saved: dict, args: argparse.Namespace, sources: list[data.Source], path: str) -> None:
    """Say which lists have changed since a checkpoint; ValueError where its network does not fit, or its
    labels would change meaning."""
    for key in ('layers', 'width', 'video_only', 'image_only'):
        was, now = saved.get('settings', {}).get(key), getattr(args, key)
        if was is not None and was != now:
            raise ValueError(
                f'{path}: has --{key.replace("_", "-")} {was}, now {now}; --work-dir takes another folder'
            )
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
        paths, labels = source.train.files.fingerprint
        old_paths, old_labels = saved.get('lists', {}).get(name, (paths, labels))
        if paths == old_paths and labels != old_labels:
            raise ValueError(
                f'{path}: the same {name}s have other labels now than when it was saved; --init starts a new '
                'run from its weights'
            )
        if paths != old_paths:
            show(f'changed since the checkpoint: the list of training {name}s')


# Lists, class folders and label maps ----------------------------------------------------------------------


def read_list(
    list_file: str,
    root: str = '',
    num_classes: int | None = None,
    videos: bool = False,
    names: list[str] | None = None,
) -> data.FileList:
    """Read `path label` lines; paths are below `root` and may contain spaces, blank lines are skipped.

    With `videos`, the form `video_id num_frames label` of the Kinetics lists (spaces or commas) is understood
    too, and a name without a video's ending gets `.mp4`. Raises ValueError with file and line for a line
    without a label, or with one that is negative, not below `num_classes` or, where that is not known, far
    beyond the number of samples.

    A folder of class folders does instead of a list, see `class_files`; `root` then plays no part.
    """
    if os.path.isdir(list_file):
        names = names or class_names(list_file)
        if num_classes not in (None, len(names)):
            raise ValueError(
                f'{list_file}: {len(names)} class folders; which of the {num_classes} classes they are '
                'only a list can say'
            )
        files = class_files(list_file, names, data.VIDEO_ENDINGS if videos else data.IMAGE_ENDINGS)
        paths = [os.fsencode(os.path.relpath(path, list_file)) for path, _ in files]
        labels = [label for _, label in files]
        return data.FileList(np.array(paths), np.array(labels, dtype=np.int64), list_file)
    paths, labels, lines = [], [], []
    with open(list_file, encoding='utf-8-sig', errors='surrogateescape') as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            match = re.fullmatch(r'(.+?)[\s,]+(-?\d+)', line.strip())
            if not match:
                raise ValueError(
                    f'{list_file}:{number}: no label, a whole number, at the end of {line.strip()[:100]!r}; '
                    'expected "path label"'
                )
            path, label = match[1], int(match[2])
            if label < 0 or num_classes and label >= num_classes:
                known = f', 0 to {num_classes - 1}' if num_classes else ''
                known += ', as classes are named' if names else ''
                raise ValueError(f'{list_file}:{number}: label {label} is out of range{known}')
            if videos and not path.lower().endswith(data.ENDINGS):
                path = re.sub(r'[\s,]+\d+$', '', path) + '.mp4'
            paths.append(os.fsencode(path))
            labels.append(label)
            lines.append(number)
    if not paths:
        raise ValueError(f'{list_file}: no samples in it; expected lines of "path label"')
    highest = int(np.argmax(labels))
    if not num_classes and labels[highest] > 10_000 + 10 * len(labels):
        raise ValueError(
            f'{list_file}:{lines[highest]}: label {labels[highest]} among {len(labels)} samples; labels '
            'number the classes from 0'
        )
    return data.FileList(np.array(paths), np.array(labels, dtype=np.int64), root)


def class_names(folder: str) -> list[str]:
    """The names of a folder's class folders, in alphabetical order."""
    names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith('.'))
    if not names:
        raise ValueError(f'{folder}: no class folders in it; a list of "path label" lines does as well')
    return names


def class_files(folder: str, names: list[str], endings: tuple[str, ...]) -> list[tuple[str, int]]:
    """(path, label) of the files in a folder of class folders, at any depth; `names` numbers the classes.

    Raises OSError, or ValueError where a class folder's name is not among them, or there is no file.
    """
    if unknown := sorted(set(class_names(folder)) - set(names)):
        raise ValueError(
            f'{os.path.join(folder, unknown[0])}: no class of this name is known; the {len(names)} that are '
            f'trained are {", ".join(names[:3])}' + ', ...' * (len(names) > 3)
        )
    numbers = {name: number for number, name in enumerate(names)}
    files = [
        (path, numbers[name])
        for name in class_names(folder)
        for path in files_below(os.path.join(folder, name), endings, (os.path.realpath(folder),))
    ]
    if not files:
        raise ValueError(f'{folder}: no file in its class folders ends with any of {" ".join(endings)}')
    return files


def files_below(folder: str, endings: tuple[str, ...], above: tuple[str, ...] = ()) -> Iterator[str]:
    """The files of a folder at any depth, hidden ones aside, in alphabetical order. Links are followed, but
    not back up to one of the folders `above`."""
    real = os.path.realpath(folder)
    for entry in sorted(os.scandir(folder), key=lambda e: e.name) if real not in above else ():
        if entry.name.startswith('.'):
            continue
        if entry.is_dir():
            yield from files_below(entry.path, endings, (*above, real))
        elif entry.name.lower().endswith(endings):
            yield entry.path


def read_label_map(path: str) -> list[str]:
    """Class names from a file with one name per line, or `name index` on every line."""
    try:
        with open(path, encoding='utf-8-sig') as file:
            names = [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f'{path}: not a text file in UTF-8; expected one class name a line') from None
    indexed = [re.fullmatch(r'(.+?)[\s,]+(\d+)', name) for name in names]
    if all(indexed) and sorted(int(match[2]) for match in indexed) == list(range(len(names))):
        return [match[1] for match in sorted(indexed, key=lambda match: int(match[2]))]
    return names
