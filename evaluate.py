"""Measure a checkpoint on a validation set, or name what files show.

    python evaluate.py --ckpt work_dirs/omni/best.pth --dump result.pkl     10 clips x 3 crops, top-1, top-5
    python evaluate.py --ckpt work_dirs/omni/best.pth --images              the image set instead
    python evaluate.py --ckpt work_dirs/omni/best.pth --show wrong.png      draw confident mistakes too
    python evaluate.py --ckpt work_dirs/omni/best.pth --features out.npz    write features, of files too
    python evaluate.py --ckpt work_dirs/omni/best.pth clip.mp4 photo.jpg    five likeliest labels of each file
    python evaluate.py --ckpt work_dirs/omni/best.pth my_clips --csv a.csv  of a folder, as a table too
    python evaluate.py --ckpt work_dirs/omni/best.pth long.mp4 --timeline   what is seen, and when
    torchrun --nproc_per_node=8 evaluate.py --ckpt work_dirs/omni/best.pth  on eight GPUs

Lists, label names and sizes come from the checkpoint; for an official MMAction2 one they are those of the
published recipe, Kinetics-400 and ImageNet. Runs on a GPU if there is one, else on the CPU.

--features writes arrays for `numpy.load`: features (N, 2048) and scores (N, classes), means over the views;
paths; and, for a set, labels. What is unreadable has NaN, and so have classes that a head lacks.
"""

import argparse
import copy
import csv
import math
import os
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

import data
from model import DualStatsBatchNorm
from runtime import checkpoint, distributed, sources
from runtime.command import Parser, check_writable, draw_rows, number, whole_file
from runtime.distributed import UserError, gather, rank, say, together, world_size
from runtime.mmaction2 import write_dump
from video import VideoReader

# the published validation set, used if neither the command nor the checkpoint names another
VAL_LIST = 'data/kinetics400/kinetics400_val_list_videos.txt'
VAL_ROOT = 'data/kinetics400/videos_val'
IMAGE_VAL_LIST = 'data/imagenet/meta/val.txt'
IMAGE_VAL_ROOT = 'data/imagenet/val'

NO_NUMBERS = 'the network gives scores that are not numbers, computing'

# Pixels of all frames in one forward pass. A CPU is fastest with small passes (two views of 8x256x256), as
# large tensors cost page faults. A GPU wants more; 16 such views take about 3 GB in fp32.
PIXELS_PER_PASS = {'cpu': 2**20, 'cuda': 2**23}


# Scores and metrics ---------------------------------------------------------------------------------------


def accuracy(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores (N, classes) and labels (N,) -> {'top1', 'top5', 'mean1'}, fractions of 1; 'top5' only if there
    are more than five classes.

    mean1 is the mean over classes of each class's top-1 accuracy. As in MMAction2, a class that is predicted
    but never occurs counts as 0. A row of NaN, an unreadable sample, is wrong and predicts nothing. Of equal
    scores the first counts as the highest, here and wherever this file names a prediction.
    """
    labels, readable = np.asarray(labels), ~np.isnan(scores[:, 0])
    ranked = np.argsort(-scores, axis=1, kind='stable')
    hits = (ranked == labels[:, None]) & readable[:, None]
    seen = np.union1d(labels, ranked[readable, 0])
    per_class = [hits[labels == label, 0].mean() if (labels == label).any() else 0.0 for label in seen]
    result = {'top1': float(hits[:, 0].mean())}
    if scores.shape[1] > 5:
        result['top5'] = float(hits[:, :5].any(1).mean())
    return result | {'mean1': float(np.mean(per_class))}


def confusions(scores: np.ndarray, labels: np.ndarray, names: list[str], count: int = 5) -> list[str]:
    """A line for each of the classes with the most errors: how many, and what it is mistaken for."""
    predicted = np.where(np.isnan(scores[:, 0]), -1, scores.argmax(1))
    errors = Counter(sorted(labels[predicted != labels].tolist()))
    lines = []
    for label, wrong in errors.most_common(count):
        taken = sorted(predicted[(labels == label) & (predicted != label) & (predicted >= 0)].tolist())
        most = [f'{names[i]} ({times})' for i, times in Counter(taken).most_common(3)]
        shown = f'taken for {", ".join(most)}' if most else 'unreadable'
        lines.append(f'{names[label]}: {wrong} of {(labels == label).sum()} wrong, {shown}')
    return lines


def likeliest(scores: Tensor, names: list[str], count: int) -> list[tuple[str, float]]:
    """The labels with the highest scores (classes,), each with its score."""
    best = scores.sort(descending=True, stable=True).indices[:count].tolist()
    return [(names[i], scores[i].item()) for i in best]


class Identity(nn.Module):
    """What is left of a BatchNorm once its affine map is part of the convolution before it: nothing."""

    def forward(self, x: Tensor, is_image: bool) -> Tensor:
        return x


def fold_batchnorm(network: nn.Module, is_image: bool) -> nn.Module:
    """A copy for inference on one source: each BatchNorm is folded into the convolution defined before it.
    The same function up to rounding, with half the passes over memory."""
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        children = list(module.named_children())
        for (conv_name, conv), (bn_name, bn) in zip(children, children[1:]):
            if isinstance(bn, DualStatsBatchNorm):
                if is_image:
                    bn.running_mean, bn.running_var = bn.image_running_mean, bn.image_running_var
                setattr(module, conv_name, fuse_conv_bn_eval(conv, bn))
                setattr(module, bn_name, Identity())
    return network.to(memory_format=torch.channels_last)


@torch.inference_mode()
def score_views(network: nn.Module, source: str, views: Tensor, precision: str, features=False) -> Tensor:
    """Views (V, 3, T, H, W) or (V, 3, H, W) of any number of samples -> softmax scores from the head of
    'video' or 'image', float32 (V, classes) on the CPU. With `features`, the view's feature follows in each
    row, (V, classes + F)."""
    device = next(network.parameters()).device
    rows = []
    for part in views.split(max(1, PIXELS_PER_PASS[device.type] // views[0, 0].numel())):
        with distributed.autocast(device, precision):
            feature = network.features(part.to(device, non_blocking=True))
            logits = network.head(source)(feature)
        scores = logits.float().softmax(1)
        rows.append(torch.cat([scores, feature.float()], 1) if features else scores)
    return torch.cat(rows).cpu()


def predict(
    network: nn.Module,
    source: str,
    dataset: Dataset,
    precision: str = 'fp32',
    batch_size: int = 1,
    workers: int = 0,
    progress: str = '',
    features: bool = False,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Scores of a whole 'val' or 'test' dataset from one head, means over each sample's views.

    Returns scores float32 (N, classes), with features as in `score_views`; labels int64 (N,) in the dataset's
    order; and a line for each unreadable file, whose scores are NaN. Under torchrun each rank scores its
    share and all return the whole. UserError if no file can be read, or if scores are not numbers.
    """
    device = next(network.parameters()).device
    if device.type == 'cpu':
        network = fold_batchnorm(network, is_image=isinstance(dataset, data.ImageDataset))
    else:  # not folded: cuDNN would add a folded convolution's bias in a pass of its own
        network = copy.deepcopy(network).eval()
    share = Subset(dataset, range(rank(), len(dataset), world_size()))
    num_views = dataset.num_clips * dataset.num_crops if dataset.mode == 'test' else 1
    size = batch_size * num_views * math.prod(dataset.shape[:-2]) * dataset.short_side**2  # bytes of a batch
    batches = distributed.loader(share, workers, size, batch_size=batch_size, collate_fn=list)
    columns = classes(network, source)
    if features:
        columns += next(network.head(source).parameters()).shape[-1]  # the head's input
    rows, bad, done = np.full((len(share), columns), np.nan, dtype=np.float32), [], 0
    quiet = None if rank() == 0 else True  # None: only if the output is not a terminal
    for samples in tqdm(batches, progress, unit='batch', leave=False, disable=quiet):
        readable = [n for n, sample in enumerate(samples) if sample.pixels is not None]
        if readable:
            views = torch.cat([samples[n].pixels.to(device, non_blocking=True) for n in readable])
            scores = score_views(network, source, views, precision, features)
            rows[[done + n for n in readable]] = scores.unflatten(0, (len(readable), -1)).mean(1)
        bad += [line for sample in samples for line in sample.bad]
        done += len(samples)

    scores = np.empty((len(dataset), columns), rows.dtype)
    for r, part in enumerate(gather(rows)):
        scores[r :: world_size()] = part
    bad = [line for part in gather(bad) for line in part]
    if len(bad) == len(dataset):
        raise UserError(f'none of the {len(dataset)} files can be read, the first is {bad[0]}')
    if np.isnan(scores).any(1).sum() > len(bad):
        raise UserError(f'{NO_NUMBERS} in {precision}')
    return scores, dataset.files.labels, bad


def validate(network: nn.Module, sources: list, precision: str, workers: int) -> dict[str, float]:
    """{'video_top1': ..., 'image_top5': ...} for each source that has a validation set."""
    result = {}
    for source in sources:
        if source.val is not None:
            title = f'validating {source.name}s'
            scores, labels, bad = predict(network, source.name, source.val, precision, 16, workers, title)
            for line in bad:
                say(f'unreadable, counted as wrong: {line}')
            for key, value in accuracy(scores, labels).items():
                result[f'{source.name}_{key}'] = round(value, 4)
    return result


def classes(network: nn.Module, source: str) -> int:
    """How many classes the head of 'video', 'image' or another source knows; ValueError if there is none."""
    head = network.head(source)
    if head is None:
        raise ValueError(f'this checkpoint has no head for {source}s')
    return list(head.parameters())[-1].shape[0]


# The command ----------------------------------------------------------------------------------------------


def show_mistakes(out: str, dataset: Dataset, scores: np.ndarray, labels: np.ndarray, names: list) -> int:
    """Draw a PNG of the eight misclassified samples whose wrong label scores highest, each under both labels
    and their scores. `dataset` is a 'val' one, so a video shows its middle clip. Returns the number of
    misclassified samples; if it is 0, nothing is written."""
    predicted, rows, titles = scores.argmax(1), [], []
    of_label, highest = scores[np.arange(len(labels)), labels], scores.max(1)
    wrong = np.flatnonzero((predicted != labels) & ~np.isnan(of_label))
    for i in wrong[np.argsort(-highest[wrong], kind='stable')][:8]:
        pixels = dataset[int(i)].pixels[0]  # (3, T, H, W) or (3, H, W)
        rows.append(pixels.transpose(0, 1) if pixels.ndim == 4 else pixels.unsqueeze(0))
        right, taken = f'{names[labels[i]]} ({of_label[i]:.0%})', f'{names[predicted[i]]} ({highest[i]:.0%})'
        titles.append(f'{os.path.basename(dataset.files.path(i))}: {right} taken for {taken}')
    if rows:
        draw_rows(out, rows, titles, 112)
    return len(wrong)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add('files', nargs='*', metavar='FILE', help='videos, images or folders to classify; no set is measured')
    add('--ckpt', required=True, help='a checkpoint of train.py, or an official one')
    add('--dump', metavar='PKL', help="write scores and labels in the format of MMAction2's result.pkl")
    add('--features', metavar='NPZ', help='write features and scores of a set, or of files; see below')
    add('--show', metavar='PNG', help='draw the most confident mistakes, with their scores')
    add('--timeline', action='store_true', help='for a long video to classify: what is seen, and when')
    add('--csv', metavar='CSV', help='write the five likeliest labels of each file: file, rank, label, score')
    add('--images', action='store_true', help='measure the image set, one centre crop each')
    add('--val-list', help="list, or folder of class folders, to measure; default: the checkpoint's")
    add('--val-root', help="folder that the list's paths start from; default: the checkpoint's")
    add('--video-labels', metavar='TXT', help="class names, one per line; default: the checkpoint's")
    add('--image-labels', metavar='TXT', help='the same for images')
    add('--clips', type=number(int, 1), default=10, help='clips of each video (default: %(default)s)')
    add('--crops', type=int, choices=(1, 3), default=3, help='crops of each clip (default: %(default)s)')
    add('--precision', choices=('fp32', 'bf16', 'fp16'), help='default: bf16 if the GPU has it, else fp32')
    add('--workers', type=number(int, 0), help='loader processes; default: its share of the cores, up to 16')
    args = parser.parse_args(argv)
    if args.files and (args.dump or args.show or args.val_list or args.images):
        parser.error('--dump, --show, --images and --val-list measure a set; leave out the files')
    if not args.files and (args.timeline or args.csv):
        parser.error('--timeline and --csv classify files; name some')
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with distributed.processes('evaluate.py') as device:
        run(args, device)


def run(args: argparse.Namespace, device: torch.device) -> None:
    """The command itself, once its processes have joined."""
    with together():
        if rank() == 0:
            check_writable(args.dump, args.features, args.show, args.csv)
        saved, names = checkpoint.load(args.ckpt), {}
        network = checkpoint.build(saved, args.ckpt).to(device)
        for kind, file in (('video', args.video_labels), ('image', args.image_labels)):
            names[kind] = sources.read_label_map(file) if file else saved.get(f'{kind}_labels')
            if names[kind] and len(names[kind]) != classes(network, kind):
                count, of = len(names[kind]), file if file else args.ckpt
                raise ValueError(f'{of}: {count} names, but the {kind} head has another number of classes')
    args.precision, why = distributed.pick_precision(args.precision, device)
    say(f'{args.ckpt}: computing in {args.precision} ({why}) on {device}')
    if network.head('image') and checkpoint.images_share_statistics(saved['model']):
        say('no image statistics in this checkpoint: images are normalized with those of the videos')
    trained = checkpoint.SIZES | saved.get('settings', {})
    if args.files:
        classify(network, args, trained, names)
    else:
        measure(network, args, trained, names)


def open_dataset(kind: str, files: data.FileList | None, args: argparse.Namespace, trained: dict) -> Dataset:
    """A test set of 'video' or 'image', sized like the training; without files, for its `load`."""
    if kind == 'image':
        return data.ImageDataset(files, 'val', trained['size'])
    clip = {key: trained[key] for key in ('size', 'clip_len', 'frame_interval')}
    return data.VideoDataset(files, 'test', **clip, num_clips=args.clips, num_crops=args.crops)


def classify(network: nn.Module, args: argparse.Namespace, trained: dict, names: dict) -> None:
    """Print what each file shows and write what was asked for. Exit with 1 if a file could not be read."""
    paths, table, rows = [], [('file', 'rank', 'label', 'score')], []
    with together():
        for path in args.files:
            paths += sources.files_of(path) if os.path.isdir(path) else [path]
    for path in paths:
        kind = 'image' if sources.is_image(path) else 'video'
        dataset = open_dataset(kind, None, args, trained)
        try:
            known = classes(network, kind)
            views = score_views(network, kind, dataset.load(path, None), args.precision, features=True)
            if not views.isfinite().all():
                raise ValueError(f'{NO_NUMBERS} in {args.precision}')
        except Exception as error:  # damaged files raise whatever the decoder trips over
            say(f'evaluate.py: {path}: {data.one_line(error)}', file=sys.stderr)
            rows.append([torch.empty(0), torch.empty(0)])
            continue
        if not names[kind]:
            names[kind] = sources.published_labels(kind, known)
        scores, features = views[:, :known], views[:, known:]
        best = likeliest(scores.mean(0), names[kind], 5)
        lines = [f'{path} ({kind})', *(f'  {score:7.2%}  {label}' for label, score in best)]
        if args.timeline and kind == 'video':
            lines += timeline(path, dataset, scores, names[kind])
        say('\n'.join(lines))
        table += [(path, place, label, f'{score:.4f}') for place, (label, score) in enumerate(best, 1)]
        rows.append([scores.mean(0), features.mean(0)])
    if args.csv and rank() == 0:
        with whole_file(args.csv, 'w', encoding='utf-8', errors='surrogateescape', newline='') as file:
            csv.writer(file).writerows(table)
    if args.features and rank() == 0:
        # An unreadable file has no scores, an image perhaps fewer than a video: rows are filled up with NaN.
        scores, features = (pad_sequence(part, True, np.nan).numpy() for part in zip(*rows))
        with whole_file(args.features) as file:
            np.savez(file, features=features, scores=scores, paths=np.array(paths))
    if not all(len(scores) for scores, _ in rows):
        sys.exit(1)


def timeline(path: str, dataset: data.VideoDataset, scores: Tensor, names: list[str]) -> list[str]:
    """A line for each clip of a video: its time and its three likeliest labels, from the scores of the views
    (crops * clips, classes)."""
    with VideoReader(path) as video:
        clips = data.sample_frames(len(video), dataset.clip_len, dataset.frame_interval, dataset.num_clips)
        last = clips[:, 0] + (dataset.clip_len - 1) * dataset.frame_interval
        starts, ends = video.times(clips[:, 0]), video.times(last.clip(max=len(video) - 1))
    lines = []
    for start, end, row in zip(starts, ends, scores.unflatten(0, (dataset.num_crops, -1)).mean(0)):
        seen = ', '.join(f'{label} {score:.1%}' for label, score in likeliest(row, names, 3))
        lines.append(f'  {start:7.1f} to {end:6.1f} s  {seen}')
    return lines


def open_set(kind: str, network: nn.Module, args: argparse.Namespace, trained: dict, names: dict) -> Dataset:
    """The validation set that the flags or the checkpoint name."""
    known = classes(network, kind)
    prefix, val_list, val_root = 'val', VAL_LIST, VAL_ROOT  # the published set
    if args.images:
        prefix, val_list, val_root = 'image_val', IMAGE_VAL_LIST, IMAGE_VAL_ROOT
    val_list = args.val_list or trained.get(f'{prefix}_list', val_list)
    if val_list is None:
        raise ValueError(f'{args.ckpt}: no {kind}s were validated in training; --val-list names a list')
    val_root = trained.get(f'{prefix}_root', val_root) if args.val_root is None else args.val_root
    if not names[kind] and os.path.isdir(val_list):
        folders = sources.class_names(val_list)
        # Their order tells their labels only if they are these numbers, or all classes of a published set.
        if folders == [str(i) for i in range(known)] or len(folders) == known in (400, 1000):
            names[kind] = folders
    if not names[kind]:
        names[kind] = sources.published_labels(kind, known)
    files = sources.open_list(val_list, val_root, 'val', names[kind], not args.images)
    return open_dataset(kind, files, args, trained)


def measure(network: nn.Module, args: argparse.Namespace, trained: dict, names: dict) -> None:
    """Score a validation set, print its metrics, and write what was asked for."""
    kind = 'image' if args.images else 'video'
    with together():
        dataset = open_set(kind, network, args, trained, names)
    workers = distributed.default_workers() if args.workers is None else args.workers
    batch, title = 16 if args.images else 1, f'{len(dataset)} {kind}s'
    rows, labels, bad = predict(
        network, kind, dataset, args.precision, batch, workers, title, bool(args.features)
    )
    scores, features = np.split(rows, [classes(network, kind)], axis=1)
    for line in bad:
        say(f'unreadable, counted as wrong: {line}', file=sys.stderr)
    views = 'centre crop' if args.images else f'{args.clips} clips x {args.crops} crops'
    unreadable = f', {len(bad)} of them unreadable' if bad else ''
    say(f'{len(dataset)} {kind}s of {scores.shape[1]} classes, {views}{unreadable}')
    titles = {'top1': 'top-1', 'top5': 'top-5', 'mean1': 'mean class'}
    say('   '.join(f'{titles[key]} {value:.2%}' for key, value in accuracy(scores, labels).items()))
    mistakes = confusions(scores, labels, names[kind])
    if mistakes:
        say('most errors:\n  ' + '\n  '.join(mistakes))
    if rank():
        return
    if args.dump:
        write_dump(args.dump, scores, labels, dataset.size if args.images else dataset.short_side)
    if args.features:
        paths = np.array([dataset.files.path(i) for i in range(len(dataset))])
        with whole_file(args.features) as file:
            np.savez(file, features=features, scores=scores, paths=paths, labels=labels)
    if args.show:
        count = show_mistakes(args.show, replace(dataset, mode='val'), scores, labels, names[kind])
        say(f'{min(count, 8)} of {count} mistakes' if count else 'no mistakes to show')


if __name__ == '__main__':
    main()
