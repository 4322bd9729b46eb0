"""Train one SlowOnly-R50 on videos and images together.

    python train.py --demo                           all of it on a small set that it makes itself, anywhere
    torchrun --nproc_per_node=8 train.py --resume    the published recipe on 8 GPUs; the same line restarts it
    python train.py --video-list train.txt --video-root videos --image-list images.txt --image-root images

Each step takes a batch of videos and a batch of images through the same weights, adds the two
cross-entropies, and does one backward pass and one SGD step. The defaults are MMAction2's published recipe
(slowonly_r50_8xb16-8x8x1-256e_imagenet-kinetics400-rgb: 77.30 top-1). Without a GPU it runs on the CPU.
"""

import argparse
import errno
import fcntl
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import evaluate
import model as models

# ----------------------------------------------------------------------------------------------------------
# Settings: each stands here once, with its default and its reason
# ----------------------------------------------------------------------------------------------------------

# What the demo sets otherwise: a network and a picture size for a CPU, and its own data. Of the recipe only
# the clipping differs: it holds back the image loss, whose gradients are 20 times the videos' in the first
# steps.
DEMO = {
    'work_dir': 'work_dirs/demo',
    'layers': (1, 1, 1, 1),
    'width': 16,
    'size': 56,
    'epochs': 16,
    'lr': 0.05,
    'clip_norm': 1.0,
    'video_list': 'data/demo/video_train.txt',
    'video_root': 'data/demo/videos_train',
    'video_labels': 'data/demo/video_labels.txt',
    'image_list': 'data/demo/image_train.txt',
    'image_root': 'data/demo/images_train',
    'image_labels': 'data/demo/image_labels.txt',
    'val_list': 'data/demo/video_val.txt',
    'val_root': 'data/demo/videos_val',
    'image_val_list': 'data/demo/image_val.txt',
    'image_val_root': 'data/demo/images_val',
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0],
        epilog=__doc__.split('\n\n', 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(flag: str, reason: str, **options) -> None:
        shown = ' (default: %(default)s)' if 'default' in options else ''
        group.add_argument(flag, help=reason + shown, **options)

    positive = data.positive
    group = parser.add_argument_group('data')
    add('--demo', 'make a small set below data/demo and train a small network on it', action='store_true')
    kinetics, imagenet = 'data/kinetics400', 'data/imagenet'
    add(
        '--video-list',
        'lines of "path label", or a folder of class folders',
        default=f'{kinetics}/kinetics400_train_list_videos.txt',
    )
    add('--video-root', 'folder that its paths are below', default=f'{kinetics}/videos_train')
    add(
        '--image-list',
        'lines of "path label", or a folder of class folders',
        default=f'{imagenet}/meta/train.txt',
    )
    add('--image-root', 'folder that its paths are below', default=f'{imagenet}/train')
    add('--val-list', 'the same, or lines of "id num_frames label"', default=evaluate.VAL_LIST)
    add('--val-root', 'folder that its paths are below', default=evaluate.VAL_ROOT)
    add('--image-val-list', 'images are validated where it exists', default=evaluate.IMAGE_VAL_LIST)
    add('--image-val-root', 'folder that its paths are below', default=evaluate.IMAGE_VAL_ROOT)
    add(
        '--video-labels', 'class names, one a line; default: as the folders or the labels in the list have it'
    )
    add('--image-labels', 'the same for images')

    group = parser.add_argument_group('network')
    add('--layers', 'blocks per stage; these are ResNet-50', type=positive, nargs=4, default=(3, 4, 6, 3))
    add('--width', 'channels of the stem', type=positive, default=64)
    add('--clip-len', 'frames of a clip', type=positive, default=8)
    add('--frame-interval', 'from one to the next: 8 x 8 spans 2 seconds', type=positive, default=8)
    add('--size', 'side of the crop, a multiple of 7: tests use 8/7 of it', type=positive, default=224)

    group = parser.add_argument_group('recipe')
    add('--epochs', 'long, as everything is learned from scratch', type=positive, default=256)
    add('--warmup-epochs', 'default: in proportion, 34 of 256', type=int)
    add('--videos-per-gpu', 'video batch of each process', type=positive, default=16)
    add('--images-per-gpu', 'default: both sets take the same number of steps, 85', type=positive)
    add('--lr', 'peak learning rate, for 128 videos a step', type=positive_float, default=0.1)
    add('--auto-scale-lr', 'scale --lr by (videos per step) / 128', action='store_true')
    add('--momentum', 'of SGD', type=float, default=0.9)
    add('--weight-decay', 'on every parameter, BatchNorm and biases too', type=float, default=1e-4)
    add('--clip-norm', 'bounds the norm of all gradients together', type=positive_float, default=40)
    add('--video-only', 'no images, no image head: the plain SlowOnly to compare with', action='store_true')
    add('--image-only', 'no videos, no video head: to learn from images first', action='store_true')
    add(
        '--init-2d',
        "start from a 2D ResNet's weights, temporal kernels inflated, or from an --image-only run",
        metavar='CKPT',
    )
    add(
        '--init',
        'start from a checkpoint of this network, of which heads may have other classes',
        metavar='CKPT',
    )

    group = parser.add_argument_group('run')
    add('--work-dir', 'checkpoints and logs', default='work_dirs/omni')
    add('--resume', 'go on from CKPT, or from the work folder', nargs='?', const='auto', metavar='CKPT')
    add('--seed', 'determines the whole run', type=int, default=0)
    add('--deterministic', 'repeatable on a GPU too, but slower', action='store_true')
    add('--precision', 'default: bf16 on a GPU that has it, else fp32', choices=('fp32', 'bf16', 'fp16'))
    add('--compile', 'torch.compile: a minute at the start, faster steps', action='store_true')
    add('--workers', 'loader processes; default: its share of the cores, at most 12', type=int)
    add('--no-validate', 'do not measure on the validation lists', action='store_true')
    add('--val-interval', 'epochs from one validation and checkpoint to the next', type=positive, default=4)
    add('--save-minutes', 'time from one checkpoint to the next', type=positive_float, default=10)
    add('--log-interval', 'steps per log line', type=positive, default=20)
    add('--max-bad', 'share of unreadable samples that ends the run', type=positive_float, default=0.01)

    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    for name in ('seed', 'warmup_epochs', 'workers', 'momentum', 'weight_decay'):
        if (getattr(args, name) or 0) < 0:
            parser.error(f'--{name.replace("_", "-")} must not be negative')
    if args.size % 7:
        parser.error('--size must be a multiple of 7, so that the short side, 8/7 of it, is a whole number')
    if args.init and args.init_2d:
        parser.error('--init and --init-2d exclude each other')
    if args.image_only and (args.video_only or args.auto_scale_lr):
        parser.error('--image-only leaves no videos for --video-only or --auto-scale-lr')
    if 1 in (args.videos_per_gpu, args.images_per_gpu):
        parser.error('a batch of 1 cannot be normalized by its own statistics: at least 2 per GPU are needed')
    if args.image_only and args.images_per_gpu is None:
        args.images_per_gpu = 85  # as the recipe's joint steps have
    if args.warmup_epochs is None:
        args.warmup_epochs = round(args.epochs * 34 / 256)
    args.layers = list(args.layers)
    return args


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f'{text} is not above 0')
    return value


# ----------------------------------------------------------------------------------------------------------
# Schedule
# ----------------------------------------------------------------------------------------------------------


def learning_rate(
    step: int, steps_per_epoch: int, base_lr: float = 0.1, warmup_epochs: int = 34, epochs: int = 256
) -> float:
    """The rate of a step, counted from 0: linear from 0.1 of base_lr, reached in the last step of the
    warm-up, then a half cosine towards 0 (https://arxiv.org/abs/1608.03983, without restarts)."""
    warmup, total = warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    if step < warmup:
        return base_lr * (0.1 + 0.9 * step / max(warmup - 1, 1))
    return base_lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


# ----------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------


class Saver:
    """Writes checkpoints into a folder while training goes on, one at a time.

    Each is whole or not there, whenever the process dies: written beside, synced, renamed. Training waits
    for a copy in memory only, which is kept and filled again: new memory would cost more than the copy.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.thread = ThreadPoolExecutor(1)
        self.copy, self.writing = None, None

    def save(self, checkpoint: dict, *names: str) -> None:
        """Save under several names, in this order, once the checkpoint before is written."""
        self.finish()
        self.copy = _copy(checkpoint, self.copy)
        self.writing = self.thread.submit(self._write, names)

    def finish(self) -> str:
        """Wait until all is written; gives what went wrong, or ''."""
        if self.writing is not None:
            self.writing.exception()
        return self.trouble()

    def trouble(self) -> str:
        """What has gone wrong by now, or ''."""
        if self.writing is None or not self.writing.done() or self.writing.exception() is None:
            return ''
        return f'{self.writing.exception()}; the older checkpoints are intact'

    def _write(self, names: tuple[str, ...]) -> None:
        temporary = self.folder / 'checkpoint.tmp'
        try:
            for left in self.folder.glob('*.tmp'):
                left.unlink()  # never written to: after a kill it can be the same file as a checkpoint
            torch.save(self.copy, temporary)
            with open(temporary, 'rb') as file:
                os.fsync(file.fileno())
            for name in names[:-1]:
                link = self.folder / f'{name}.tmp'
                os.link(temporary, link)
                os.replace(link, self.folder / name)
            os.replace(temporary, self.folder / names[-1])
            folder = os.open(self.folder, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
            for path in sorted(self.folder.glob('epoch_*.pth'), key=_epoch)[:-3]:
                path.unlink()
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            temporary.unlink(missing_ok=True)
            reason, free = str(error).splitlines()[0], shutil.disk_usage(self.folder).free >> 20
            path = self.folder / names[0]
            raise OSError(f'{path} cannot be written ({reason}), {free} MB are free there') from None


def _copy(value, old):
    """`value` with its tensors on the CPU, in the memory of `old`, an earlier copy, where there is one."""
    if isinstance(value, Tensor):
        same = isinstance(old, Tensor) and old.shape == value.shape and old.dtype == value.dtype
        return (old if same else torch.empty_like(value, device='cpu')).copy_(value)
    if isinstance(value, dict):
        old = old if isinstance(old, dict) else {}
        return {key: _copy(part, old.get(key)) for key, part in value.items()}
    if isinstance(value, list):
        return [_copy(part, None) for part in value]
    return value


def _epoch(path: Path) -> int:
    """N of epoch_N.pth."""
    number = path.stem.removeprefix('epoch_')
    return int(number) if number.isdigit() else 0


def find_checkpoint(args: argparse.Namespace, show) -> tuple[dict | None, str]:
    """What --resume asks for, and its path: the file named, or the newest good one in the work folder, or
    None.

    Raises OSError or ValueError where the named one, or every one in the folder, cannot be used.
    """
    if args.resume != 'auto':
        return _load_run(Path(args.resume)), args.resume
    folder, damaged = Path(args.work_dir), 0
    newest_first = [folder / 'latest.pth', *sorted(folder.glob('epoch_*.pth'), key=_epoch, reverse=True)]
    for path in [*newest_first, folder / 'best.pth']:
        try:
            checkpoint = _load_run(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            damaged += 1
            show(f'skipping {error}')
            continue
        show(f'resuming from {path}')
        return checkpoint, str(path)
    if damaged:
        raise ValueError(f'{folder}: no checkpoint in it is whole; without them, --resume starts afresh')
    show(f'nothing to resume in {folder}: starting afresh')
    return None, ''


def _load_run(path: Path) -> dict:
    """A checkpoint to go on from. torch.load does not look at the checksums that torch.save has written."""
    checkpoint = models.load_checkpoint(str(path))
    if 'optimizer' not in checkpoint:
        raise ValueError(f'{path}: holds weights only, no training run to go on with')
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        damaged = error
    if damaged:
        raise ValueError(f'{path}: not a checkpoint, or a damaged one (wrong checksum: {damaged})')
    return checkpoint


def changes(saved: dict, args: argparse.Namespace) -> list[str]:
    """Settings that differ from those of a checkpoint, as text."""
    harmless = ('work_dir', 'resume', 'workers', 'save_minutes', 'log_interval')
    now = vars(args)
    return [
        f'{k} {saved[k]} -> {now[k]}' for k in now if k in saved and saved[k] != now[k] and k not in harmless
    ]


# ----------------------------------------------------------------------------------------------------------
# Several processes
# ----------------------------------------------------------------------------------------------------------


def gather_statistics(network: nn.Module, world_size: int) -> Tensor:
    """The running statistics of all ranks, float (world_size, N), on the CPU of every rank."""
    flat = torch.cat([b.flatten() for name, b in network.named_buffers() if 'running_' in name]).cpu()
    rows = [flat] if world_size == 1 else [torch.empty_like(flat) for _ in range(world_size)]
    if world_size > 1:
        dist.all_gather(rows, flat)
    return torch.stack(rows)


def set_statistics(network: nn.Module, flat: Tensor) -> None:
    """Set this rank's running statistics from a row, or the mean of the rows, of `gather_statistics`."""
    buffers = [b for name, b in network.named_buffers() if 'running_' in name]
    for buffer, values in zip(buffers, flat.split([b.numel() for b in buffers])):
        buffer.copy_(values.view_as(buffer))


class UserError(Exception):
    """The run cannot start or go on; the message says what is wrong, where, and what to do."""


DIED = 'a process of the run has died or hangs, of too little memory perhaps; --resume goes on'


class StopSignals:
    """Remembers SIGTERM or SIGINT, for the step boundary; a second one ends the process at once."""

    def __init__(self):
        self.received = 0
        self.launcher = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else None
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._note)

    def _note(self, signum, frame) -> None:
        signal.signal(signum, signal.SIG_DFL)
        self.received = signum

    def asks(self) -> int:
        """The signal, if any. Ranks that a killed torchrun has left behind stop as if it had sent one."""
        orphaned = self.launcher is not None and os.getppid() != self.launcher
        return self.received or (signal.SIGTERM if orphaned else 0)


def add_up(world_size: int, *numbers: int) -> list[int]:
    """The sums of the numbers over all ranks, which keeps them in step: where one stops or saves, all do."""
    flags = torch.tensor(numbers)
    if world_size > 1:
        dist.all_reduce(flags)
    return flags.tolist()


def gather(world_size: int, value) -> list:
    """What each rank has, on all ranks."""
    values = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values


def stop_together(world_size: int, trouble: str) -> None:
    """Raise UserError on all ranks where one of them, called with a text, is in trouble."""
    for text in filter(None, gather(world_size, trouble)):
        raise UserError(text)


def lock(log) -> None:
    """Raise OSError if another run writes to this log. The lock ends with the process, however that ends."""
    try:
        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # others mean a file system without locks
            folder = Path(log.name).parent
            raise OSError(f'{folder} is in use by a run that goes on; --work-dir takes another') from None


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------


def train_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: dict,
    device: torch.device,
    precision: str = 'fp32',
    clip_norm: float = 40,
) -> tuple[list[Tensor], tuple[Tensor, ...], list[Tensor], Tensor]:
    """One joint step on a batch of `data.collate`: videos and images, one summed loss, one update.

    Returns losses, logits and labels of each source, and the norm of all gradients before clipping, all of
    them on the device: nothing here waits for a GPU. Where the norm is not finite, no weight is changed.
    """
    inputs = [x.to(device, non_blocking=True) for x in batch['inputs']]  # clips, images
    labels = [x.to(device, non_blocking=True) for x in batch['labels']]
    with evaluate.autocast(device, precision):
        logits = net(*inputs)
        logits = logits if isinstance(logits, tuple) else (logits,)
        losses = [F.cross_entropy(l, t) for l, t in zip(logits, labels)]
    optimizer.zero_grad()
    scaler.scale(sum(losses)).backward()
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    grad_norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
    if precision != 'fp16':  # as the scaler does: where this is not 0, the fused step changes nothing
        optimizer.found_inf = (~grad_norm.isfinite()).float()
    scaler.step(optimizer)
    scaler.update()
    return losses, logits, labels, grad_norm


# ----------------------------------------------------------------------------------------------------------
# The log
# ----------------------------------------------------------------------------------------------------------


class Meter:
    """Sums up what a step yields, on the device; reading it is the only thing that waits for the GPU."""

    def __init__(self, device: torch.device, sources: list[str]):
        self.device, self.sources = device, sources
        self.reset()

    def reset(self) -> None:
        self.rows, self.files, self.data_time, self.start = [], [], 0.0, time.perf_counter()

    @torch.no_grad()
    def add(self, losses: list[Tensor], logits: tuple, labels: tuple, grad_norm: Tensor, files: list) -> None:
        hits = [(l.argmax(1) == t).float().mean() for l, t in zip(logits, labels)]
        self.rows.append(torch.stack([*losses, *hits, grad_norm]).float())
        self.files.append(files)

    def not_finite(self) -> tuple[int, list[str]] | None:
        """The first step since the last reset whose loss is not finite: how many there were up to it, and its
        files."""
        if not self.rows:
            return None
        losses = torch.stack(self.rows)[:, : len(self.sources)]
        broken = (~losses.isfinite()).any(1).nonzero()
        return (int(broken[0]) + 1, self.files[broken[0]]) if len(broken) else None

    def read(self) -> dict[str, float]:
        """Means per step since the last reset."""
        means = torch.stack(self.rows).mean(0).tolist()
        count = len(self.sources)
        record = {'loss': sum(means[:count])}
        record |= {f'{source}_loss': value for source, value in zip(self.sources, means)}
        record |= {f'{source}_top1': value for source, value in zip(self.sources, means[count:])}
        record['grad_norm'] = means[-1]
        record['time'] = (time.perf_counter() - self.start) / len(self.rows)
        record['data_time'] = self.data_time / len(self.rows)
        if self.device.type == 'cuda':
            record['memory_mb'] = torch.cuda.max_memory_allocated() // 2**20
        else:
            record['memory_mb'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
        return {key: round(value, 4) for key, value in record.items()}


def log_line(record: dict, epochs: int, steps: int) -> str:
    sources = [source for source in ('video', 'image') if f'{source}_loss' in record]
    parts = [
        f'epoch {record["epoch"]}/{epochs} step {record["step"]}/{steps}',
        f'lr {record["lr"]:.4g}',
        f'loss {record["loss"]:.3f} (' + ', '.join(f'{s} {record[f"{s}_loss"]:.3f}' for s in sources) + ')',
        'top-1 ' + ', '.join(f'{s} {record[f"{s}_top1"]:.1%}' for s in sources),
        f'grad {record["grad_norm"]:.2f}',
        f'{record["time"]:.3f} s/step (data {record["data_time"]:.3f})',
        f'{record["memory_mb"]:.0f} MB',
        f'eta {record["eta"]}',
    ]
    return '  '.join(parts)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------


def open_lists(args: argparse.Namespace) -> tuple[dict, dict, dict]:
    """Read lists and label maps: {set: Samples}, {source: label names or None}, {source: number of
    classes}."""
    wanted = {'video': 'video', 'image': 'image', 'val': 'video', 'image_val': 'image'}
    if args.no_validate or not Path(args.image_val_list).exists():
        del wanted['image_val']
    if args.no_validate:
        del wanted['val']
    samples, names, classes = {}, {}, {}
    for name, source in wanted.items():
        if (args.video_only and source == 'image') or (args.image_only and source == 'video'):
            continue
        list_file, root = getattr(args, f'{name}_list'), getattr(args, f'{name}_root')
        is_folder = os.path.isdir(list_file)
        for path, flag, is_there in ((list_file, 'list', os.path.exists), (root, 'root', os.path.isdir)):
            if not is_there(path) and not is_folder:
                raise FileNotFoundError(
                    f'{path}: no such {"file" if flag == "list" else "folder"}, expected there by '
                    f'--{name.replace("_", "-")}-{flag}; the README shows how the folders are laid out, and '
                    '`python train.py --demo` makes a small set of its own'
                )
        label_map = getattr(args, f'{source}_labels')
        if source not in names:
            names[source] = None
            if label_map or is_folder:
                names[source] = data.read_label_map(label_map) if label_map else data.class_names(list_file)
            classes[source] = len(names[source]) if names[source] else None
        samples[name] = data.read_list(list_file, root, classes[source], source == 'video', names[source])
        start = [samples[name].path(i) for i in range(min(10, len(samples[name].labels)))]
        if not any(os.path.exists(path) for path in start):
            raise FileNotFoundError(f'{start[0]}: no such file, nor any other of the first of {list_file}')
        if classes[source] is None:
            classes[source] = int(samples[name].labels.max()) + 1
    return samples, names, classes


def main(argv: list[str] | None = None) -> models.OmniSlowOnly:
    args = parse_args(argv)
    device = evaluate.pick_device()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    show = tqdm.write if rank == 0 else lambda *_, **__: None
    try:
        try:
            return run(args, device, rank, world_size, show)
        finally:
            data.end_workers()  # first, as the death of one would interrupt what is said below
    except UserError as error:
        show(f'train.py: {error}', file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # the log cannot be written, say
        print(f'train.py: {error}', file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ('DataLoader', 'gloo')):
            raise
        print(f'train.py: {DIED} ({str(error).splitlines()[0]})', file=sys.stderr)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(args: argparse.Namespace, device: torch.device, rank: int, world_size: int, show) -> nn.Module:
    """The whole program for one process; returns the trained network."""
    work_dir = Path(args.work_dir)
    precision, why = evaluate.pick_precision(args.precision, device)
    if args.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic

    # The lists, the network and the run to go on with; whatever is wrong with them is the user's to mend.
    log, checkpoint, trouble = open(os.devnull, 'w'), None, ''
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            log = open(work_dir / 'log.jsonl', 'a', buffering=1)
            lock(log)
            if args.demo:
                data.make_demo('data/demo')
    except OSError as error:
        trouble = str(error)
    stop_together(world_size, trouble)
    try:
        samples, names, classes = open_lists(args)
        if args.resume:
            checkpoint, checkpoint_path = find_checkpoint(args, show)
        elif any(work_dir.glob('*.pth')) and not args.demo:
            raise ValueError(
                f'{work_dir} holds a run: --resume goes on with it, --work-dir takes another folder'
            )
        counts = {source: len(samples[source].labels) for source in classes}
        if args.images_per_gpu is None:
            steps = max(counts['video'] // (args.videos_per_gpu * world_size), 1)
            args.images_per_gpu = max(counts.get('image', 0) // (steps * world_size), 2)
        per_gpu = {
            'video': 0 if args.image_only else args.videos_per_gpu,
            'image': 0 if args.video_only else args.images_per_gpu,
        }
        sampler = data.JointSampler(
            counts.get('video', 0),
            counts.get('image', 0),
            *per_gpu.values(),
            rank,
            world_size,
            args.seed,
            args.epochs,
        )
        torch.manual_seed(args.seed)  # the initial weights
        network = models.OmniSlowOnly(
            classes.get('video', 0), classes.get('image', 0), args.layers, args.width
        )
        if args.init_2d and checkpoint is None:
            try:
                inflated = models.inflate_2d(models.load_weights(args.init_2d), network)
            except ValueError as error:
                raise ValueError(f'{args.init_2d}: {error}') from None
            network.load_state_dict(inflated, strict=False)
        if args.init and checkpoint is None:
            given = models.load_checkpoint(args.init)
            # As many classes can still be others, or the same in another order.
            other = [s for s in classes if names[s] and given.get(f'{s}_labels') not in (None, names[s])]
            fresh = models.load_all_but_other_heads(network, given['model'], args.init, other)
            show(
                f'starting from {args.init}'
                + (f', with a new head for {" and ".join(fresh)}s' if fresh else '')
            )
        if checkpoint is not None:
            models.load_into(network, checkpoint['model'], checkpoint_path)
    except (OSError, ValueError) as error:
        trouble = str(error)
    stop_together(world_size, trouble)
    place = checkpoint and (checkpoint['epoch'], checkpoint['done'])
    if gather(world_size, place) != [place] * world_size:
        raise UserError(f'the processes found different checkpoints: all nodes must share {work_dir}')
    if checkpoint is None and rank == 0:
        log.truncate(0)
        for old in [*work_dir.glob('*.pth'), *work_dir.glob('events.*'), work_dir / 'bad_samples.txt']:
            old.unlink(missing_ok=True)

    # What learns. Every rank keeps its own running statistics, so DDP must not broadcast them.
    network.to(device)
    net = torch.compile(network) if args.compile else network
    if world_size > 1:
        device_ids = [device.index] if device.type == 'cuda' else None
        with warnings.catch_warnings():  # torch 2.15 renames the argument, 2.11 does not know the new name
            warnings.simplefilter('ignore', FutureWarning)
            net = DistributedDataParallel(
                net, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        # In its first backward pass DDP learns in which order gradients come, and orders its sums by it from
        # then on. Done once on nothing, every step, the first after a restart too, adds up in that order.
        before = {key: value.clone() for key, value in network.state_dict().items()}
        sides = [args.clip_len, args.size, args.size]
        nothing = [torch.zeros(3, *sides, dtype=torch.uint8)] * per_gpu['video']
        nothing += [torch.zeros(3, *sides[1:], dtype=torch.uint8)] * per_gpu['image']
        batch = data.collate([data.Item(pixels, 0, '', []) for pixels in nothing])
        unmoved = torch.optim.SGD(network.parameters(), 0.0, fused=True)
        train_step(net, unmoved, torch.amp.GradScaler(enabled=False), batch, device, precision)
        network.load_state_dict(before)
    base_lr = args.lr * args.videos_per_gpu * world_size / 128 if args.auto_scale_lr else args.lr
    optimizer = torch.optim.SGD(
        network.parameters(), base_lr, args.momentum, weight_decay=args.weight_decay, fused=True
    )
    for parameter in network.parameters():  # the fused step leaves them unset if it skips the first update
        optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')
    best = -1.0
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint['optimizer'])
        scaler.load_state_dict(checkpoint['scaler'])
        sampler.epoch, sampler.done, best = checkpoint['epoch'], checkpoint['done'], checkpoint['best']
        statistics = checkpoint['statistics']
        same = len(statistics) == world_size
        set_statistics(network, (statistics[rank] if same else statistics.mean(0)).to(device))
        if not same:
            left = ' and '.join(f'{counts[s] - sampler.done[s]} {s}s' for s in classes)
            show(
                f'{len(statistics)} processes -> {world_size}: the other {left} of epoch '
                f'{sampler.epoch + 1} are dealt out anew'
            )
        for change in changes(checkpoint['settings'], args):
            show(f'changed since the checkpoint: {change}')

    # What it learns from.
    clip = {'size': args.size, 'clip_len': args.clip_len, 'frame_interval': args.frame_interval}
    train_sets = {}
    if 'video' in samples:
        train_sets['video'] = data.VideoDataset(samples['video'], 'train', **clip, seed=args.seed)
    if 'image' in samples:
        train_sets['image'] = data.ImageDataset(samples['image'], 'train', args.size, args.seed)
    val_sets = {}
    if 'val' in samples:
        val_sets['video'] = data.VideoDataset(samples['val'], 'val', **clip)
    if 'image_val' in samples:
        val_sets['image'] = data.ImageDataset(samples['image_val'], 'val', args.size)
    workers = evaluate.default_workers() if args.workers is None else args.workers
    loader = DataLoader(
        data.JointDataset(train_sets),
        batch_sampler=sampler,
        collate_fn=data.collate,
        num_workers=workers,
        worker_init_fn=data.leave_signals_to_main,
        pin_memory=device.type == 'cuda',
        timeout=1800 if workers else 0,  # as long as ranks wait for one another
    )

    steps_per_epoch = sampler.steps_per_epoch
    show(f'{world_size} x {device.type}, {precision} ({why}), {workers} workers each, seed {args.seed}')
    show('training on ' + ' and '.join(f'{counts[s]} {s}s in {n} classes' for s, n in classes.items()))
    batch_text = ' and '.join(f'{world_size} x {n} {s}s' for s, n in per_gpu.items() if n)
    show(f'{steps_per_epoch} steps an epoch of {batch_text}, {args.epochs} epochs, learning rate {base_lr:g}')

    saver = Saver(work_dir)

    def save(*file_names: str, epoch: int, done: dict[str, int]) -> None:
        """Save the state after `done` samples of `epoch`; called on all ranks, as each has statistics."""
        statistics = gather_statistics(network, world_size)
        if rank == 0:
            state = {
                'model': network.state_dict(),
                'optimizer': optimizer.state_dict(),
                'scaler': scaler.state_dict(),
                'statistics': statistics,
                'epoch': epoch,
                'done': done,
                'best': best,
                'settings': vars(args),
                'video_labels': names.get('video'),
                'image_labels': names.get('image'),
            }
            saver.save(state, *file_names)

    def check_losses(meter: Meter, epoch: int, step: int) -> None:
        """Stop all ranks where a loss of the last steps, the newest of them `step`, is not finite."""
        trouble, found = '', meter.not_finite()
        if found:
            back, files = found
            step = step - len(meter.rows) + back
            trouble = (
                f'loss is not finite in epoch {epoch + 1} step {step + 1}, rank {rank}; neither the weights '
                'nor the checkpoints were touched by it. Its files:\n  ' + '\n  '.join(files)
            )
        stop_together(world_size, trouble)

    board = None
    if rank == 0:
        try:
            from torch.utils.tensorboard import SummaryWriter

            steps_done = sampler.epoch * steps_per_epoch + sampler.steps_done(sampler.done)
            board = SummaryWriter(str(work_dir), purge_step=steps_done + 1, flush_secs=10)
        except ImportError:  # it is not needed: log.jsonl has the same numbers
            pass

    def write_log(record: dict, iteration: int, tag: str) -> None:
        """One line of log.jsonl; its numbers also as TensorBoard events, where that is installed."""
        print(json.dumps(record), file=log)
        for key, value in record.items() if board else ():
            if isinstance(value, (int, float)):
                board.add_scalar(f'{tag}/{key}', value, iteration)

    stop = StopSignals()
    bad_list = open(work_dir / 'bad_samples.txt', 'a+', buffering=1)
    bad_list.seek(0)
    listed = set(bad_list)
    batches = iter(loader)
    last_save = time.monotonic()

    for epoch in range(sampler.epoch, args.epochs):
        done = dict(sampler.done) if epoch == sampler.epoch else {'video': 0, 'image': 0}
        first = sampler.steps_done(done)
        unreadable = 0
        meter = Meter(device, list(classes))
        title = f'epoch {epoch + 1}/{args.epochs}'
        quiet = None if rank == 0 else True  # None: shown on a terminal only
        end = first + sampler.steps_left(done)
        bar = tqdm(total=end, initial=first, desc=title, unit='step', leave=False, disable=quiet)
        for step in range(first, end):
            waiting = time.perf_counter()
            batch, trouble = next_batch(batches)
            meter.data_time += time.perf_counter() - waiting

            # Between two steps: what one rank has met, all of them act on.
            trouble, asked = trouble or saver.trouble(), stop.asks()
            save_due = rank == 0 and time.monotonic() - last_save > 60 * args.save_minutes
            in_trouble, save_due, terminated, interrupted, bad = add_up(
                world_size,
                bool(trouble),
                save_due,
                asked == signal.SIGTERM,
                asked == signal.SIGINT,
                len(batch['bad']),
            )
            if in_trouble:
                stop_together(world_size, trouble)
            for line in batch['bad']:
                if f'{line}\n' not in listed:
                    listed.add(f'{line}\n')
                    print(line, file=bad_list)
            unreadable += bad
            drawn = sum(done.values()) + world_size * sum(per_gpu.values())
            if unreadable > max(args.max_bad * drawn, 20):
                raise UserError(
                    f'{unreadable} of the {drawn} samples drawn in this epoch are unreadable, more than '
                    f'--max-bad {args.max_bad:g} allows; {work_dir}/bad_samples.txt lists them'
                )
            if save_due or terminated or interrupted:
                check_losses(meter, epoch, step - 1)
                save('latest.pth', epoch=epoch, done=done)
                last_save = time.monotonic()
            if terminated or interrupted:
                stop_together(world_size, saver.finish())
                signum = signal.SIGTERM if terminated else signal.SIGINT
                show(f'stopped by {signum.name} and saved; --resume goes on from here')
                sys.exit(128 + signum)

            iteration = epoch * steps_per_epoch + step
            lr = learning_rate(iteration, steps_per_epoch, base_lr, args.warmup_epochs, args.epochs)
            for group in optimizer.param_groups:
                group['lr'] = lr
            # Dropout is the one thing in a step that draws random numbers.
            torch.manual_seed(int(data.generator('dropout', args.seed, iteration, rank).integers(2**62)))
            results = train_step(net, optimizer, scaler, batch, device, precision, args.clip_norm)
            meter.add(*results, batch['paths'])
            bar.update()
            done = {source: count + world_size * per_gpu[source] for source, count in done.items()}
            if (step + 1) % args.log_interval == 0 or step + 1 == end:
                check_losses(meter, epoch, step)
                record = {'epoch': epoch + 1, 'step': step + 1, 'lr': lr, **meter.read()}
                remaining = args.epochs * steps_per_epoch - iteration - 1
                record |= {
                    'unreadable': unreadable,
                    'eta': str(timedelta(seconds=round(remaining * record['time']))),
                }
                meter.reset()
                show(log_line(record, args.epochs, steps_per_epoch))
                write_log(record, iteration + 1, 'train')
                bar.set_postfix(loss=record['loss'], lr=f'{lr:.3g}', eta=record['eta'])
        bar.close()
        if unreadable:
            show(f'{unreadable} unreadable samples were replaced, see {work_dir}/bad_samples.txt')

        set_statistics(network, gather_statistics(network, world_size).mean(0).to(device))
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == args.epochs:
            result = {}
            saver.finish()  # the loader's workers are forked, which a thread at work does not survive
            network.eval()
            for source, dataset in val_sets.items():
                progress = f'validating {source}s'
                try:
                    scores, labels, bad = evaluate.predict(network, dataset, precision, 16, workers, progress)
                except ValueError as error:
                    raise UserError(error) from None
                for line in bad:
                    show(f'unreadable, counted as wrong: {line}')
                result |= {f'{source}_{k}': round(v, 4) for k, v in evaluate.accuracy(scores, labels).items()}
            network.train()
            if result:
                record = {'epoch': epoch + 1, 'mode': 'val', **result}
                write_log(record, (epoch + 1) * steps_per_epoch, 'val')
                show(f'{title} validation  ' + '  '.join(f'{k} {v:.1%}' for k, v in result.items()))
            if epoch + 1 < args.epochs:  # with fresh workers, as decoding leaves a little more memory in use
                sampler.epoch, sampler.done = epoch + 1, {'video': 0, 'image': 0}
                batches = iter(loader)
            file_names = [f'epoch_{epoch + 1}.pth']
            top1 = result.get('image_top1' if args.image_only else 'video_top1', -1)
            if top1 > best:
                best = top1
                file_names.append('best.pth')
            # latest.pth comes last: once a run can go on from it, the others are there
            save(*file_names, 'latest.pth', epoch=epoch + 1, done={'video': 0, 'image': 0})
            last_save = time.monotonic()

    stop_together(world_size, saver.finish())
    if board:
        board.close()
    if args.demo and val_sets:
        network.eval()
        tests = {}
        if 'video' in val_sets:
            tests['videos, 10 clips x 3 crops'] = data.VideoDataset(samples['val'], 'test', **clip)
        if 'image' in val_sets:
            tests['images, centre crop'] = val_sets['image']
        show(f'\n{"held-out":28}{"files":>8}{"chance":>8}{"top-1":>8}')
        for title, dataset in tests.items():
            scores, labels, _ = evaluate.predict(network, dataset, precision, 1, workers, 'testing')
            top1 = evaluate.accuracy(scores, labels)['top1']
            show(f'{title:28}{len(labels):8}{1 / scores.shape[1]:8.1%}{top1:8.1%}')
        images = ' --images' if args.image_only else ''
        show(f'\nNext: python evaluate.py --ckpt {work_dir}/latest.pth{images} --dump result.pkl')
    return network


def next_batch(batches) -> tuple[dict, str]:
    """The loader's next batch, and '' or why there is none."""
    try:
        return next(batches), ''
    except (ConnectionError, EOFError) as error:  # it broke off while it handed over a batch
        data.end_workers()  # else the signal that it has died interrupts what follows
        return {'bad': []}, f'{DIED} (DataLoader worker: {error})'
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        if 'in a row are unreadable' not in last:
            raise
        return {'bad': []}, last.removeprefix('RuntimeError: ')


if __name__ == '__main__':
    main()
