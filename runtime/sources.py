"""What a run learns from: its lists opened, what is odd about them said, and compared with a checkpoint's."""

import argparse
import os

import numpy as np

import data
from runtime.distributed import show, world_size


def open_sources(args: argparse.Namespace) -> list[data.Source]:
    """What the run learns from. Raises OSError or ValueError where a list is not usable."""
    sources = []
    if not args.image_only:
        sources.append(open_source(args, 'video', 'val', args.videos_per_gpu))
    if not args.video_only:
        sources.append(open_source(args, 'image', 'image_val', args.images_per_gpu))
    for source in sources:
        if source.per_gpu is None:  # as many as give the same number of steps as the videos do
            steps = max(len(sources[0].train) // (args.videos_per_gpu * world_size()), 1)
            source.per_gpu = max(len(source.train) // (steps * world_size()), 2)
    return sources


def open_source(args: argparse.Namespace, name: str, val: str, per_gpu: int | None) -> data.Source:
    """The source of --NAME-list, --NAME-root and --NAME-labels, validated on --VAL-list and --VAL-root."""
    list_file, label_map = getattr(args, f'{name}_list'), getattr(args, f'{name}_labels')
    labels = None
    if label_map:
        if not os.path.exists(label_map):
            raise FileNotFoundError(f'{label_map}: no such file, given by --{name}-labels')
        labels = data.read_label_map(label_map)
    elif os.path.isdir(list_file):
        labels = data.class_names(list_file)
    samples = open_list(args, name, labels, len(labels) if labels else None, name == 'video')
    classes = len(labels) if labels else int(samples.labels.max()) + 1
    check_classes(samples, name, list_file, labels, classes)
    held_out = None
    if getattr(args, f'{val}_list') and not args.no_validate:
        held_out = open_list(args, val, labels, classes, name == 'video')
    if name == 'video':
        clip = {'size': args.size, 'clip_len': args.clip_len, 'frame_interval': args.frame_interval}
        train = data.VideoDataset(samples, 'train', seed=args.seed, **clip)
        held_out = held_out and data.VideoDataset(held_out, 'val', **clip)
    else:
        purpose = 'ImageDataset' if name == 'image' else name
        train = data.ImageDataset(samples, 'train', args.size, args.seed, purpose)
        held_out = held_out and data.ImageDataset(held_out, 'val', args.size)
    return data.Source(name, labels, classes, train, held_out, per_gpu)


def open_list(
    args: argparse.Namespace, prefix: str, labels: list[str] | None, classes: int | None, videos: bool
) -> data.Samples:
    """The samples of --PREFIX-list and --PREFIX-root."""
    list_file, root = getattr(args, f'{prefix}_list'), getattr(args, f'{prefix}_root')
    if not os.path.exists(list_file):
        raise FileNotFoundError(
            f'{list_file}: no such file, expected there by --{prefix.replace("_", "-")}-list; the README '
            'shows how the folders are laid out, and `python train.py --demo` makes a small set of its own'
        )
    samples = data.read_list(list_file, root, classes, videos, labels)
    start = [samples.path(i) for i in range(min(10, len(samples)))]
    if not any(os.path.exists(path) for path in start):
        raise FileNotFoundError(
            f'{start[0]}: no such file, nor any other of the first of {list_file}; '
            f'--{prefix.replace("_", "-")}-root names the folder that they are below, now {root!r}'
        )
    return samples


def check_classes(
    samples: data.Samples, name: str, list_file: str, labels: list[str] | None, classes: int
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
            + ('; labels are expected to count from 0' if empty[0] == 0 else '')
        )
    endings = tuple(ending.encode() for ending in data.IMAGE_ENDINGS)
    pictures = sum(path.lower().endswith(endings) for path in samples.paths) if name == 'video' else 0
    if pictures:
        show(f'{list_file}: {pictures} of the {len(samples)} videos are images, each a video of one frame')


def compare_data(saved: dict, sources: list[data.Source], path: str) -> None:
    """Say which lists have changed since a checkpoint; ValueError where its labels would change meaning."""
    for source in sources:
        name, before, now = source.name, saved.get(f'{source.name}_labels'), source.labels
        if before and now and before != now:
            label = next((i for i, pair in enumerate(zip(before, now)) if pair[0] != pair[1]), len(now))
            was, new = (names[label] if label < len(names) else 'none' for names in (before, now))
            raise ValueError(
                f'{path}: {name} label {label} was {was!r} there and is {new!r} now; --init starts a new '
                'run from its weights'
            )
        paths, labels = source.train.samples.fingerprint()
        old_paths, old_labels = saved.get('lists', {}).get(name, (paths, labels))
        if paths == old_paths and labels != old_labels:
            raise ValueError(f'{path}: the same {name}s have other labels now than when it was saved')
        if paths != old_paths:
            show(f'changed since the checkpoint: the list of training {name}s')
