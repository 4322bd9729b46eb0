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

# What the demo sets otherwise: a network and a picture size for a CPU, and its own data. Of the recipe only the
# clipping differs: it holds back the image loss, whose gradients are 20 times the videos' in the first steps.
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
    parser.add_argument(
        '--demo', action='store_true', help='make a small set below data/demo and train on that'
    )

    add = parser.add_argument_group('data').add_argument
    kinetics, imagenet = 'data/kinetics400', 'data/imagenet'
    add('--video-list', default=f'{kinetics}/kinetics400_train_list_videos.txt', help='lines of "path label"')
    add('--video-root', default=f'{kinetics}/videos_train', help='folder that those paths are below')
    add('--image-list', default=f'{imagenet}/meta/train.txt', help='lines of "path label"')
    add('--image-root', default=f'{imagenet}/train')
    add('--val-list', default=evaluate.VAL_LIST, help='"path label" or "id num_frames label"')
    add('--val-root', default=evaluate.VAL_ROOT)
    add(
        '--image-val-list',
        default=evaluate.IMAGE_VAL_LIST,
        help='images are validated where this file exists',
    )
    add('--image-val-root', default=evaluate.IMAGE_VAL_ROOT)
    add('--video-labels', help='class names, one a line; without, as many classes as the list has labels')
    add('--image-labels', help='the same for images')

    add = parser.add_argument_group('network').add_argument
    positive = evaluate.positive
    add(
        '--layers',
        type=positive,
        nargs=4,
        default=(3, 4, 6, 3),
        help='blocks per stage; 3 4 6 3 is ResNet-50',
    )
    add('--width', type=positive, default=64, help='channels of the stem')
    add('--clip-len', type=positive, default=8, help='frames of a clip')
    add(
        '--frame-interval',
        type=positive,
        default=8,
        help='frames from one of them to the next: 8 x 8 spans 2 s',
    )
    add(
        '--size',
        type=positive,
        default=224,
        help='side of the training crop, a multiple of 7; tests use 8/7 of it',
    )

    add = parser.add_argument_group('recipe').add_argument
    add('--epochs', type=positive, default=256, help='long, as everything is trained from scratch')
    add('--warmup-epochs', type=int, help='default: in proportion, 34 of 256')
    add('--videos-per-gpu', type=positive, default=16, help='video batch of each process')
    add(
        '--images-per-gpu', type=positive, help='default: so that both sets take the same number of steps, 85'
    )
    add('--lr', type=positive_float, default=0.1, help='peak learning rate, for 128 videos a step')
    add('--auto-scale-lr', action='store_true', help='scale --lr by (videos per step) / 128')
    add('--momentum', type=float, default=0.9)
    add('--weight-decay', type=float, default=1e-4, help='on every parameter')
    add('--clip-norm', type=positive_float, default=40, help='bounds the norm of all gradients together')
    add(
        '--video-only',
        action='store_true',
        help='no images, no image head: the plain SlowOnly to compare with',
    )
    add('--init-2d', metavar='CKPT', help="start from a 2D ResNet's weights, temporal kernels inflated")

    add = parser.add_argument_group('run').add_argument
    add('--work-dir', default='work_dirs/omni', help='checkpoints and logs')
    add(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CKPT',
        help='go on from CKPT, or from what the work folder holds',
    )
    add('--seed', type=int, default=0, help='with it, the whole run is determined')
    add(
        '--deterministic',
        action='store_true',
        help='only deterministic kernels: repeatable on a GPU too, slower',
    )
    add('--precision', choices=('fp32', 'bf16', 'fp16'), help='default: bf16 on a GPU that has it, else fp32')
    add(
        '--compile',
        action='store_true',
        help='torch.compile the network: a minute at the start, faster steps',
    )
    add(
        '--workers',
        type=int,
        help='loader processes per process; default: its share of the cores, at most 12',
    )
    add('--no-validate', action='store_true', help='do not measure on the validation lists')
    add(
        '--val-interval',
        type=positive,
        default=4,
        help='epochs from one validation and checkpoint to the next',
    )
    add('--save-minutes', type=positive_float, default=10, help='at most so much work is lost in a crash')
    add('--log-interval', type=positive, default=20, help='steps per log line')

    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    for name, low in (
        ('seed', 0),
        ('warmup_epochs', 0),
        ('workers', 0),
        ('momentum', 0),
        ('weight_decay', 0),
    ):
        value = getattr(args, name)
        if value is not None and value < low:
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
    """Write one checkpoint under several names. Each is whole or not there, whenever the process is
    killed."""
    temporary = paths[0].with_name(f'{paths[0].name}.tmp')
    with open(temporary, 'wb') as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    for path in paths[1:]:
        link = path.with_name(f'{path.name}.tmp')
        link.unlink(missing_ok=True)
        os.link(temporary, link)
        os.replace(link, path)
    os.replace(temporary, paths[0])
    folder = os.open(paths[0].parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def find_checkpoint(args: argparse.Namespace, show) -> dict | None:
    """The checkpoint that --resume asks for: the file named, or the newest good one in the work folder, or
    None."""
    if args.resume != 'auto':
        checkpoint = models.load_checkpoint(args.resume)
        if 'optimizer' not in checkpoint:
            raise ValueError(f'{args.resume}: holds weights only, no training run to go on with')
        return checkpoint
    candidates = sorted(
        Path(args.work_dir).glob('*.pth'), key=lambda path: path.stat().st_mtime, reverse=True
    )
    for path in candidates:
        try:
            checkpoint = models.load_checkpoint(str(path))
        except (OSError, ValueError) as error:
            show(f'skipping {error}')
            continue
        if 'optimizer' in checkpoint:
            show(f'resuming from {path}')
            return checkpoint
    show(f'nothing to resume in {args.work_dir}: starting afresh')
    return None


# ----------------------------------------------------------------------------------------------------------
# Several processes
# ----------------------------------------------------------------------------------------------------------


def flat_statistics(network: nn.Module) -> Tensor:
    """All running statistics in one float tensor; every rank has its own, as each sees its own batches."""
    return torch.cat([b.flatten() for name, b in network.named_buffers() if 'running_' in name])


def set_statistics(network: nn.Module, flat: Tensor) -> None:
    buffers = [b for name, b in network.named_buffers() if 'running_' in name]
    for buffer, values in zip(buffers, flat.split([b.numel() for b in buffers])):
        buffer.copy_(values.view_as(buffer))


def gather_statistics(network: nn.Module, world_size: int) -> Tensor:
    """The statistics of all ranks, float (world_size, N), on the CPU of every rank."""
    flat = flat_statistics(network).cpu()
    if world_size == 1:
        return flat[None]
    rows = [torch.empty_like(flat) for _ in range(world_size)]
    dist.all_gather(rows, flat)
    return torch.stack(rows)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------


def open_lists(args: argparse.Namespace) -> tuple[dict, dict, dict]:
    """Read the lists and label maps: ({name: Samples}, {source: label names or None}, {source: number of
    classes})."""
    samples, names, classes = {}, {}, {}
    sets = [('video', 'video', True), ('val', 'video', not args.no_validate)]
    sets += [('image', 'image', not args.video_only)]
    sets += [
        (
            'image_val',
            'image',
            not args.no_validate and not args.video_only and Path(args.image_val_list).exists(),
        )
    ]
    for name, source, wanted in sets:
        if not wanted:
            continue
        list_file, root = getattr(args, f'{name}_list'), getattr(args, f'{name}_root')
        for path, kind, is_there in ((list_file, 'list', os.path.isfile), (root, 'folder', os.path.isdir)):
            if not is_there(path):
                flag = f'--{name.replace("_", "-")}-{"list" if kind == "list" else "root"}'
                raise FileNotFoundError(
                    f'{path}: no such {kind}, expected there by {flag}; the README shows how the folders are '
                    'laid out, and `python train.py --demo` makes a small set of its own'
                )
        labels = getattr(args, f'{source}_labels')
        if source not in names:
            names[source] = data.read_label_map(labels) if labels else None
            classes[source] = len(names[source]) if labels else None
        samples[name] = data.read_list(list_file, root, classes[source], videos=source == 'video')
        if classes[source] is None:
            classes[source] = int(samples[name].labels.max()) + 1
        if not os.path.exists(samples[name].path(0)):
            raise FileNotFoundError(
                f'{samples[name].path(0)}: no such file; it is the first sample of {list_file}'
            )
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


class UserError(Exception):
    """Something the user gave cannot be used; the message says what, where, and what to do."""


def run(
    args: argparse.Namespace, device: torch.device, rank: int, world_size: int, show
) -> models.OmniSlowOnly:
    """The whole program for one process; returns the trained network."""
    work_dir = Path(args.work_dir)
    precision, why = evaluate.pick_precision(args.precision, device)
    if args.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic

    # the data, the network and the state of a run to go on with: whatever is wrong with them is the user's to
    # mend
    try:
        if args.demo and rank == 0:
            data.make_demo('data/demo')
        if world_size > 1:
            dist.barrier()
        samples, names, classes = open_lists(args)
        checkpoint = find_checkpoint(args, show) if args.resume else None
        if checkpoint is None and not args.demo and (work_dir / 'latest.pth').exists():
            raise ValueError(
                f'{work_dir} holds a run: add --resume to go on with it, or choose another --work-dir'
            )
        work_dir.mkdir(parents=True, exist_ok=True)
        evaluate.check_writable(str(work_dir / 'log.jsonl'))

        num_videos = len(samples['video'].labels)
        num_images = 0 if args.video_only else len(samples['image'].labels)
        if args.images_per_gpu is None:
            steps = max(num_videos // (args.videos_per_gpu * world_size), 1)
            args.images_per_gpu = max(num_images // (steps * world_size), 2)
        sampler = data.JointSampler(
            num_videos,
            num_images,
            args.videos_per_gpu,
            0 if args.video_only else args.images_per_gpu,
            rank,
            world_size,
            args.seed,
            args.epochs,
        )
        torch.manual_seed(args.seed)  # the initial weights
        network = models.OmniSlowOnly(classes['video'], classes.get('image', 0), args.layers, args.width)
        if args.init_2d and checkpoint is None:
            state = models.load_weights(args.init_2d)
            network.load_state_dict(models.inflate_2d(state, network), strict=False)
        if checkpoint is not None:
            models.load_into(network, checkpoint['model'], str(args.resume))
    except (OSError, ValueError) as error:
        raise UserError(error) from None

    # everything that learns
    network.to(device)
    net = torch.compile(network) if args.compile else network
    if world_size > 1:
        # Every rank keeps its own running statistics, averaged after each epoch, so DDP must not broadcast
        # them.
        device_ids = [device.index] if device.type == 'cuda' else None
        net = DistributedDataParallel(net, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    base_lr = args.lr * args.videos_per_gpu * world_size / 128 if args.auto_scale_lr else args.lr
    optimizer = torch.optim.SGD(
        network.parameters(), base_lr, args.momentum, weight_decay=args.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')
    best = -1.0
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint['optimizer'])
        scaler.load_state_dict(checkpoint['scaler'])
        sampler.epoch, sampler.done, best = checkpoint['epoch'], checkpoint['done'], checkpoint['best']
        if len(checkpoint['statistics']) == world_size:
            set_statistics(network, checkpoint['statistics'][rank].to(device))

    # everything that it learns from
    clip = {'size': args.size, 'clip_len': args.clip_len, 'frame_interval': args.frame_interval}
    videos = data.VideoDataset(samples['video'], 'train', **clip, seed=args.seed)
    images = None if args.video_only else data.ImageDataset(samples['image'], 'train', args.size, args.seed)
    validation = {}
    if 'val' in samples:
        validation['video'] = data.VideoDataset(samples['val'], 'val', **clip)
    if 'image_val' in samples:
        validation['image'] = data.ImageDataset(samples['image_val'], 'val', args.size)
    workers = evaluate.default_workers() if args.workers is None else args.workers
    loader = DataLoader(
        data.JointDataset(videos, images),
        batch_sampler=sampler,
        collate_fn=data.collate,
        num_workers=workers,
        pin_memory=device.type == 'cuda',
    )

    steps_per_epoch = sampler.steps_per_epoch
    show(f'{world_size} x {device.type}, {precision} ({why}), {workers} workers each, seed {args.seed}')
    counts = {'video': num_videos, 'image': num_images}
    show('training on ' + ' and '.join(f'{counts[s]} {s}s in {n} classes' for s, n in classes.items()))
    show(
        f'{steps_per_epoch} steps an epoch of {world_size} x {args.videos_per_gpu} videos'
        + ('' if args.video_only else f' and {world_size} x {args.images_per_gpu} images')
        + f', {args.epochs} epochs, peak learning rate {base_lr:g}'
    )
    stop = StopSignals()
    log = open(work_dir / 'log.jsonl', 'a') if rank == 0 else None
    batches = iter(loader)
    last_save = time.monotonic()

    def checkpoint_to(*file_names: str, epoch: int, done: dict[str, int]) -> None:
        """Save the state after `done` samples of `epoch`. All ranks call it, as it collects what each has
        alone."""
        nonlocal last_save
        statistics = gather_statistics(network, world_size)
        if rank == 0:
            averaged = {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}
            state = {
                'model': averaged,
                'optimizer': optimizer.state_dict(),
                'scaler': scaler.state_dict(),
                'statistics': statistics,
                'epoch': epoch,
                'done': done,
                'best': best,
                'settings': vars(args),
                'video_labels': names['video'],
                'image_labels': names.get('image'),
                'world_size': world_size,
            }
            save(state, *(work_dir / name for name in file_names))
        last_save = time.monotonic()

    for epoch in range(sampler.epoch, args.epochs):
        first = sampler.done['video'] // (args.videos_per_gpu * world_size) if epoch == sampler.epoch else 0
        meter = Meter(device)
        bar = tqdm(
            total=steps_per_epoch,
            initial=first,
            desc=f'epoch {epoch + 1}/{args.epochs}',
            unit='step',
            leave=False,
            disable=None if rank == 0 else True,
        )
        for step in range(first, steps_per_epoch):
            # one step of the method, from here ...
            iteration = epoch * steps_per_epoch + step
            lr = learning_rate(iteration, steps_per_epoch, base_lr, args.warmup_epochs, args.epochs)
            for group in optimizer.param_groups:
                group['lr'] = lr
            waiting = time.perf_counter()
            batch = next(batches)
            meter.data_time += time.perf_counter() - waiting
            clips, images, video_labels, image_labels = (
                None if batch[key] is None else batch[key].to(device, non_blocking=True)
                for key in ('clips', 'images', 'video_labels', 'image_labels')
            )
            # Dropout is the one thing in a step that draws random numbers.
            torch.manual_seed(int(data.generator('dropout', args.seed, iteration, rank).integers(2**62)))
            with evaluate.autocast(device, precision):
                logits = (net(clips),) if images is None else net(clips, images)
                losses = [F.cross_entropy(l, t) for l, t in zip(logits, (video_labels, image_labels))]
            optimizer.zero_grad()
            scaler.scale(sum(losses)).backward()
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(network.parameters(), args.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            # ... to here. Nothing above waits for the GPU.

            meter.add(losses, logits, (video_labels, image_labels), grad_norm)
            bar.update()
            for line in batch['bad']:
                show(f'unreadable, replaced: {line}')
            if (step + 1) % args.log_interval == 0 or step + 1 == steps_per_epoch:
                record = {'epoch': epoch + 1, 'step': step + 1, 'lr': lr, **meter.read()}
                remaining = args.epochs * steps_per_epoch - iteration - 1
                record['eta'] = str(timedelta(seconds=round(remaining * record['time'])))
                show(log_line(record, args.epochs, steps_per_epoch))
                if log:
                    print(json.dumps(record), file=log, flush=True)
                bar.set_postfix(loss=record['loss'], lr=f'{lr:.3g}', eta=record['eta'])
            save_due = time.monotonic() - last_save > 60 * args.save_minutes
            signum, save_due = agree(stop.signum, save_due, world_size)
            if signum or save_due:
                drawn = step + 1
                done = {
                    'video': drawn * args.videos_per_gpu * world_size,
                    'image': drawn * args.images_per_gpu * world_size,
                }
                checkpoint_to('latest.pth', epoch=epoch, done=done)
            if signum:
                show(f'stopped by {signal.Signals(signum).name}, saved; --resume goes on from here')
                sys.exit(128 + signum)
        bar.close()

        set_statistics(network, gather_statistics(network, world_size).mean(0).to(device))
        last = epoch + 1 == args.epochs
        if (epoch + 1) % args.val_interval == 0 or last:
            result = {}
            network.eval()
            for source, dataset in validation.items():
                scores, labels, bad = evaluate.predict(
                    network, dataset, precision, 16, workers, f'validating {source}s'
                )
                for line in bad:
                    show(f'unreadable, counted as wrong: {line}')
                result |= {f'{source}_{k}': round(v, 4) for k, v in evaluate.accuracy(scores, labels).items()}
            network.train()
            if result and log:
                print(json.dumps({'epoch': epoch + 1, 'mode': 'val', **result}), file=log, flush=True)
            if result:
                show(f'epoch {epoch + 1}: ' + ' '.join(f'{key} {value:.2%}' for key, value in result.items()))
            file_names = [f'epoch_{epoch + 1}.pth', 'latest.pth']
            if result.get('video_top1', -1) > best:
                best = result['video_top1']
                file_names.append('best.pth')
            checkpoint_to(*file_names, epoch=epoch + 1, done={'video': 0, 'image': 0})
            if rank == 0:
                saved = sorted(work_dir.glob('epoch_*.pth'), key=lambda path: int(path.stem.split('_')[1]))
                for path in saved[:-3]:
                    path.unlink()

    if args.demo:
        network.eval()
        tests = {}
        if 'video' in validation:
            tests['video, 10 clips x 3 crops'] = data.VideoDataset(samples['val'], 'test', **clip)
        if 'image' in validation:
            tests['image, centre crop'] = validation['image']
        show(f'\n{"held-out files":30}{"number":>8}{"chance":>8}{"top-1":>8}')
        for title, dataset in tests.items():
            scores, labels, _ = evaluate.predict(network, dataset, precision, 1, workers, 'testing')
            top1 = evaluate.accuracy(scores, labels)['top1']
            show(f'{title:30}{len(labels):8}{1 / scores.shape[1]:8.1%}{top1:8.1%}')
        show(f'\nNext: python evaluate.py --ckpt {work_dir}/latest.pth --dump result.pkl')
    return network


class Meter:
    """Sums up what a step yields, on the device; reading it is the only thing that waits for the GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.sums, self.steps, self.data_time, self.start = 0, 0, 0.0, time.perf_counter()

    @torch.no_grad()
    def add(
        self, losses: list[Tensor], logits: tuple[Tensor, ...], labels: tuple[Tensor, ...], grad_norm: Tensor
    ) -> None:
        hits = [(l.argmax(1) == t).float().mean() for l, t in zip(logits, labels)]
        self.sums = self.sums + torch.stack([*losses, *hits, grad_norm]).float()
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Means per step since the last reading."""
        means = (self.sums / self.steps).tolist()
        sources = ('video', 'image')[: len(means) // 2]
        record = {'loss': sum(means[: len(sources)])}
        record |= {f'{source}_loss': value for source, value in zip(sources, means)}
        record |= {f'{source}_top1': value for source, value in zip(sources, means[len(sources) :])}
        record |= {
            'grad_norm': means[-1],
            'time': (time.perf_counter() - self.start) / self.steps,
            'data_time': self.data_time / self.steps,
        }
        record = {key: round(value, 4) for key, value in record.items()}
        if self.device.type == 'cuda':
            record['memory_mb'] = torch.cuda.max_memory_allocated() // 2**20
        else:
            record['memory_mb'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
        self.reset()
        return record


def log_line(record: dict, epochs: int, steps: int) -> str:
    sources = [source for source in ('video', 'image') if f'{source}_loss' in record]
    return '  '.join(
        [
            f'epoch {record["epoch"]}/{epochs} step {record["step"]}/{steps}',
            f'lr {record["lr"]:.4g}',
            f'loss {record["loss"]:.3f} ('
            + ', '.join(f'{s} {record[f"{s}_loss"]:.3f}' for s in sources)
            + ')',
            'top-1 ' + ', '.join(f'{s} {record[f"{s}_top1"]:.1%}' for s in sources),
            f'grad {record["grad_norm"]:.2f}',
            f'{record["time"]:.3f} s/step (data {record["data_time"]:.3f})',
            f'{record["memory_mb"]} MB',
            f'eta {record["eta"]}',
        ]
    )


class StopSignals:
    """Remembers SIGTERM or SIGINT, for the step boundary; a second one ends the process at once."""

    def __init__(self):
        self.signum = 0
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._note)

    def _note(self, signum, frame) -> None:
        signal.signal(signum, signal.SIG_DFL)
        self.signum = signum


def agree(signum: int, save_due: bool, world_size: int) -> tuple[int, bool]:
    """All ranks stop and save at the same step: if one has a reason, all have."""
    if world_size == 1:
        return signum, save_due
    flags = torch.tensor([signum, int(save_due)])
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return int(flags[0]), bool(flags[1])


if __name__ == '__main__':
    main()
