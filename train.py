"""Train one SlowOnly-R50 on videos and images together.

    python train.py --demo                              everything on a small set that it makes itself, on any
    machine
    torchrun --nproc_per_node=8 train.py --resume       the published recipe on 8 GPUs; the same line restarts
    it
    python train.py --video-list train.txt --video-root videos --image-list images.txt --image-root images ...

Each step takes a batch of videos and a batch of images through the same weights, adds the two
cross-entropies, and does one backward pass and one SGD step. The defaults are MMAction2's published recipe
(slowonly_r50_8xb16-8x8x1-256e_imagenet-kinetics400-rgb: 77.30 top-1). Without a GPU it runs on the CPU.
"""

import argparse
import json
import math
import os
import resource
import signal
import sys
import time
import warnings
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

    positive = evaluate.positive
    group = parser.add_argument_group('data')
    add('--demo', 'make a small set below data/demo and train a small network on it', action='store_true')
    kinetics, imagenet = 'data/kinetics400', 'data/imagenet'
    add('--video-list', 'lines of "path label"', default=f'{kinetics}/kinetics400_train_list_videos.txt')
    add('--video-root', 'folder that its paths are below', default=f'{kinetics}/videos_train')
    add('--image-list', 'lines of "path label"', default=f'{imagenet}/meta/train.txt')
    add('--image-root', 'folder that its paths are below', default=f'{imagenet}/train')
    add('--val-list', '"path label" or "id num_frames label"', default=evaluate.VAL_LIST)
    add('--val-root', 'folder that its paths are below', default=evaluate.VAL_ROOT)
    add('--image-val-list', 'images are validated where it exists', default=evaluate.IMAGE_VAL_LIST)
    add('--image-val-root', 'folder that its paths are below', default=evaluate.IMAGE_VAL_ROOT)
    add('--video-labels', 'class names, one a line; without it the list says how many classes there are')
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
    add('--init-2d', "start from a 2D ResNet's weights, temporal kernels inflated", metavar='CKPT')

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
    if 1 in (args.videos_per_gpu, args.images_per_gpu):
        parser.error('a batch of 1 cannot be normalized by its own statistics: at least 2 per GPU are needed')
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


def save(checkpoint: dict, *paths: Path) -> None:
    """Write one checkpoint under several names, each of them whole or not there whenever the process dies.

    Raises OSError where it cannot be written; what was there before is left as it is.
    """
    temporary = paths[0].with_name(f'{paths[0].name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise OSError(f'{paths[0]} cannot be written ({reason}); the older checkpoints are intact') from None
    for path in paths[1:]:
        link = path.with_name(f'{path.name}.tmp')
        link.unlink(missing_ok=True)
        os.link(temporary, link)
        os.replace(link, path)
    os.replace(temporary, paths[0])
    folder = os.open(paths[0].parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def find_checkpoint(args: argparse.Namespace, show) -> tuple[dict | None, str]:
    """What --resume asks for, and its path: the file named, or the newest good one in the work folder, or
    None."""
    if args.resume != 'auto':
        checkpoint = models.load_checkpoint(args.resume)
        if 'optimizer' not in checkpoint:
            raise ValueError(f'{args.resume}: holds weights only, no training run to go on with')
        return checkpoint, args.resume
    newest_first = sorted(Path(args.work_dir).glob('*.pth'), key=lambda path: -path.stat().st_mtime_ns)
    for path in newest_first:
        try:
            checkpoint = models.load_checkpoint(str(path))
        except (OSError, ValueError) as error:
            show(f'skipping {error}')
            continue
        if 'optimizer' in checkpoint:
            show(f'resuming from {path}')
            return checkpoint, str(path)
    show(f'nothing to resume in {args.work_dir}: starting afresh')
    return None, ''


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


class StopSignals:
    """Remembers SIGTERM or SIGINT, for the step boundary; a second one ends the process at once."""

    def __init__(self):
        self.signum = 0
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._note)

    def _note(self, signum, frame) -> None:
        signal.signal(signum, signal.SIG_DFL)
        self.signum = signum


def add_up(world_size: int, *numbers: int) -> list[int]:
    """The sums of the numbers over all ranks, which keeps them in step: where one stops or saves, all do."""
    flags = torch.tensor(numbers)
    if world_size > 1:
        dist.all_reduce(flags)
    return flags.tolist()


# ----------------------------------------------------------------------------------------------------------
# The log
# ----------------------------------------------------------------------------------------------------------


class Meter:
    """Sums up what a step yields, on the device; reading it is the only thing that waits for the GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.rows, self.files, self.data_time, self.start = [], [], 0.0, time.perf_counter()

    @torch.no_grad()
    def add(self, losses: list[Tensor], logits: tuple, labels: tuple, grad_norm: Tensor, files: list) -> None:
        hits = [(l.argmax(1) == t).float().mean() for l, t in zip(logits, labels)]
        self.rows.append(torch.stack([*losses, *hits, grad_norm]).float())
        self.files.append(files)

    def first_not_finite(self) -> int | None:
        """The place, since the last reset, of the first step whose loss is not finite."""
        losses = torch.stack(self.rows)[:, : len(self.rows[0]) // 2]
        broken = (~losses.isfinite()).any(1).nonzero()
        return int(broken[0]) if len(broken) else None

    def read(self) -> dict[str, float]:
        """Means per step since the last reset."""
        means = torch.stack(self.rows).mean(0).tolist()
        sources = ('video', 'image')[: len(means) // 2]
        record = {'loss': sum(means[: len(sources)])}
        record |= {f'{source}_loss': value for source, value in zip(sources, means)}
        record |= {f'{source}_top1': value for source, value in zip(sources, means[len(sources) :])}
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


class UserError(Exception):
    """The run cannot start or go on; the message says what is wrong, where, and what to do."""


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
        if source == 'image' and args.video_only:
            continue
        list_file, root = getattr(args, f'{name}_list'), getattr(args, f'{name}_root')
        for path, flag, is_there in ((list_file, 'list', os.path.isfile), (root, 'root', os.path.isdir)):
            if not is_there(path):
                raise FileNotFoundError(
                    f'{path}: no such {"file" if flag == "list" else "folder"}, expected there by '
                    f'--{name.replace("_", "-")}-{flag}; the README shows how the folders are laid out, and '
                    '`python train.py --demo` makes a small set of its own'
                )
        label_map = getattr(args, f'{source}_labels')
        if source not in names:
            names[source] = data.read_label_map(label_map) if label_map else None
            classes[source] = len(names[source]) if label_map else None
        samples[name] = data.read_list(list_file, root, classes[source], videos=source == 'video')
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
        return run(args, device, rank, world_size, show)
    except UserError as error:
        show(f'train.py: {error}', file=sys.stderr)
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
    try:
        if args.demo and rank == 0:
            data.make_demo('data/demo')
        if world_size > 1:
            dist.barrier()
        samples, names, classes = open_lists(args)
        checkpoint, source_path = find_checkpoint(args, show) if args.resume else (None, '')
        if checkpoint is None and not args.demo and any(work_dir.glob('*.pth')):
            raise ValueError(
                f'{work_dir} holds a run: --resume goes on with it, --work-dir takes another folder'
            )
        work_dir.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            evaluate.check_writable(str(work_dir / 'log.jsonl'))
            if checkpoint is None:  # only the demo gets here with an older run in the folder
                for old in [*work_dir.glob('*.pth'), work_dir / 'log.jsonl', work_dir / 'bad_samples.txt']:
                    old.unlink(missing_ok=True)

        counts = {source: len(samples[source].labels) for source in classes}
        if args.images_per_gpu is None:
            steps = max(counts['video'] // (args.videos_per_gpu * world_size), 1)
            args.images_per_gpu = max(counts.get('image', 0) // (steps * world_size), 2)
        per_gpu = {'video': args.videos_per_gpu, 'image': 0 if args.video_only else args.images_per_gpu}
        sampler = data.JointSampler(
            counts['video'],
            counts.get('image', 0),
            *per_gpu.values(),
            rank,
            world_size,
            args.seed,
            args.epochs,
        )
        torch.manual_seed(args.seed)  # the initial weights
        network = models.OmniSlowOnly(classes['video'], classes.get('image', 0), args.layers, args.width)
        if args.init_2d and checkpoint is None:
            try:
                inflated = models.inflate_2d(models.load_weights(args.init_2d), network)
            except ValueError as error:
                raise ValueError(f'{args.init_2d}: {error}') from None
            network.load_state_dict(inflated, strict=False)
        if checkpoint is not None:
            models.load_into(network, checkpoint['model'], source_path)
    except (OSError, ValueError) as error:
        raise UserError(error) from None

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
    parameters = list(network.parameters())
    base_lr = args.lr * args.videos_per_gpu * world_size / 128 if args.auto_scale_lr else args.lr
    optimizer = torch.optim.SGD(
        parameters, base_lr, args.momentum, weight_decay=args.weight_decay, fused=True
    )
    for parameter in parameters:  # the fused step would leave them unset if it had to skip the first update
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
            show(f'{len(statistics)} processes -> {world_size}: the rest of the epoch is dealt out anew')
        for change in changes(checkpoint['settings'], args):
            show(f'changed since the checkpoint: {change}')

    # What it learns from.
    clip = {'size': args.size, 'clip_len': args.clip_len, 'frame_interval': args.frame_interval}
    train_sets = {'video': data.VideoDataset(samples['video'], 'train', **clip, seed=args.seed)}
    if not args.video_only:
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
    )

    steps_per_epoch = sampler.steps_per_epoch
    show(f'{world_size} x {device.type}, {precision} ({why}), {workers} workers each, seed {args.seed}')
    show('training on ' + ' and '.join(f'{counts[s]} {s}s in {n} classes' for s, n in classes.items()))
    batch_text = ' and '.join(f'{world_size} x {n} {s}s' for s, n in per_gpu.items() if n)
    show(f'{steps_per_epoch} steps an epoch of {batch_text}, {args.epochs} epochs, learning rate {base_lr:g}')

    def save_to(*file_names: str, epoch: int, done: dict[str, int]) -> None:
        """Save the state after `done` samples of `epoch`; called on all ranks, as each has statistics."""
        statistics = gather_statistics(network, world_size)
        if rank > 0:
            return
        state = {
            'model': network.state_dict(),
            'optimizer': optimizer.state_dict(),
            'scaler': scaler.state_dict(),
            'statistics': statistics,
            'epoch': epoch,
            'done': done,
            'best': best,
            'settings': vars(args),
            'video_labels': names['video'],
            'image_labels': names.get('image'),
        }
        try:
            save(state, *(work_dir / name for name in file_names))
        except OSError as error:
            raise UserError(error) from None

    stop = StopSignals()
    log = open(work_dir / 'log.jsonl', 'a', buffering=1) if rank == 0 else open(os.devnull, 'w')
    bad_list = open(work_dir / 'bad_samples.txt', 'a', buffering=1)
    batches = iter(loader)
    last_save = time.monotonic()

    for epoch in range(sampler.epoch, args.epochs):
        done = dict(sampler.done) if epoch == sampler.epoch else {'video': 0, 'image': 0}
        first = done['video'] // (args.videos_per_gpu * world_size)
        unreadable = 0
        meter = Meter(device)
        title = f'epoch {epoch + 1}/{args.epochs}'
        quiet = None if rank == 0 else True  # None: shown on a terminal only
        bar = tqdm(total=steps_per_epoch, initial=first, desc=title, unit='step', leave=False, disable=quiet)
        for step in range(first, first + sampler.steps_left(done)):
            waiting = time.perf_counter()
            batch = next_batch(batches)
            meter.data_time += time.perf_counter() - waiting

            # One step of the method, from here ...
            iteration = epoch * steps_per_epoch + step
            lr = learning_rate(iteration, steps_per_epoch, base_lr, args.warmup_epochs, args.epochs)
            for group in optimizer.param_groups:
                group['lr'] = lr
            inputs = [x.to(device, non_blocking=True) for x in batch['inputs']]  # clips, images
            labels = [x.to(device, non_blocking=True) for x in batch['labels']]
            # Dropout is the one thing in a step that draws random numbers.
            torch.manual_seed(int(data.generator('dropout', args.seed, iteration, rank).integers(2**62)))
            with evaluate.autocast(device, precision):
                logits = net(*inputs)
                logits = logits if isinstance(logits, tuple) else (logits,)
                losses = [F.cross_entropy(l, t) for l, t in zip(logits, labels)]
            optimizer.zero_grad()
            scaler.scale(sum(losses)).backward()
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(parameters, args.clip_norm)
            if precision != 'fp16':  # as the scaler does: where this is not 0, the fused step changes nothing
                optimizer.found_inf = (~grad_norm.isfinite()).float()
            scaler.step(optimizer)
            scaler.update()
            # ... to here. Nothing in it waits for the GPU.

            meter.add(losses, logits, labels, grad_norm, batch['paths'])
            bar.update()
            for source, count in per_gpu.items():
                done[source] += count * world_size
            for line in batch['bad']:
                print(line, file=bad_list)
            log_due = (step + 1) % args.log_interval == 0 or step + 1 == steps_per_epoch
            save_due = rank == 0 and time.monotonic() - last_save > 60 * args.save_minutes
            broken = meter.first_not_finite() if log_due or save_due or device.type == 'cpu' else None
            if broken is not None:
                at = f'epoch {epoch + 1} step {step + 2 - len(meter.rows) + broken}'
                files = '\n  '.join(meter.files[broken])
                print(
                    f'train.py: loss is not finite in {at}, rank {rank}; its files:\n  {files}',
                    file=sys.stderr,
                )
            terminated, interrupted, save_due, broken, bad = add_up(
                world_size,
                stop.signum == signal.SIGTERM,
                stop.signum == signal.SIGINT,
                save_due,
                broken is not None,
                len(batch['bad']),
            )
            if broken:
                raise UserError('stopped; neither the weights nor the checkpoints were touched by that step')
            unreadable += bad
            if unreadable > max(args.max_bad * sum(done.values()), 20):
                raise UserError(
                    f'{unreadable} of the {sum(done.values())} samples drawn in this epoch are unreadable, '
                    f'more than --max-bad {args.max_bad:g} allows; {work_dir}/bad_samples.txt lists them'
                )
            if log_due:
                record = {'epoch': epoch + 1, 'step': step + 1, 'lr': lr, **meter.read()}
                remaining = args.epochs * steps_per_epoch - iteration - 1
                record |= {
                    'unreadable': unreadable,
                    'eta': str(timedelta(seconds=round(remaining * record['time']))),
                }
                meter.reset()
                show(log_line(record, args.epochs, steps_per_epoch))
                print(json.dumps(record), file=log)
                bar.set_postfix(loss=record['loss'], lr=f'{lr:.3g}', eta=record['eta'])
            if terminated or interrupted or save_due:
                save_to('latest.pth', epoch=epoch, done=done)
                last_save = time.monotonic()
            if terminated or interrupted:
                signum = signal.SIGTERM if terminated else signal.SIGINT
                show(f'stopped by {signum.name} and saved; --resume goes on from here')
                sys.exit(128 + signum)
        bar.close()
        if unreadable:
            show(f'{unreadable} unreadable samples were replaced, see {work_dir}/bad_samples.txt')

        set_statistics(network, gather_statistics(network, world_size).mean(0).to(device))
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == args.epochs:
            result = {}
            network.eval()
            for source, dataset in val_sets.items():
                progress = f'validating {source}s'
                scores, labels, bad = evaluate.predict(network, dataset, precision, 16, workers, progress)
                for line in bad:
                    show(f'unreadable, counted as wrong: {line}')
                result |= {f'{source}_{k}': round(v, 4) for k, v in evaluate.accuracy(scores, labels).items()}
            network.train()
            if result:
                print(json.dumps({'epoch': epoch + 1, 'mode': 'val', **result}), file=log)
                show(f'{title} validation  ' + '  '.join(f'{k} {v:.1%}' for k, v in result.items()))
            file_names = [f'epoch_{epoch + 1}.pth', 'latest.pth']
            if result.get('video_top1', -1) > best:
                best = result['video_top1']
                file_names.append('best.pth')
            save_to(*file_names, epoch=epoch + 1, done={'video': 0, 'image': 0})
            last_save = time.monotonic()
            if rank == 0:
                numbered = sorted(work_dir.glob('epoch_*.pth'), key=lambda path: int(path.stem.split('_')[1]))
                for path in numbered[:-3]:
                    path.unlink()

    if args.demo and val_sets:
        network.eval()
        tests = {'videos, 10 clips x 3 crops': data.VideoDataset(samples['val'], 'test', **clip)}
        tests |= {'images, centre crop': val_sets['image']} if 'image' in val_sets else {}
        show(f'\n{"held-out":28}{"files":>8}{"chance":>8}{"top-1":>8}')
        for title, dataset in tests.items():
            scores, labels, _ = evaluate.predict(network, dataset, precision, 1, workers, 'testing')
            top1 = evaluate.accuracy(scores, labels)['top1']
            show(f'{title:28}{len(labels):8}{1 / scores.shape[1]:8.1%}{top1:8.1%}')
        show(f'\nNext: python evaluate.py --ckpt {work_dir}/latest.pth --dump result.pkl')
    return network


def next_batch(batches) -> dict:
    """The loader's next batch; UserError where it gave up on unreadable files."""
    try:
        return next(batches)
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        if 'in a row are unreadable' not in last:
            raise
        raise UserError(last.removeprefix('RuntimeError: ')) from None


if __name__ == '__main__':
    main()
