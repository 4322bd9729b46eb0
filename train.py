"""Train one SlowOnly-R50 on videos and images together.

    python train.py --demo                           all of it on a small set that it makes itself, anywhere
    torchrun --nproc_per_node=8 train.py --resume    the published recipe on 8 GPUs; the same line restarts it
    python train.py --video-list train.txt --video-root videos --image-list images.txt --image-root images

Each step takes a batch of videos and a batch of images through the same weights, adds the two
cross-entropies, and does one backward pass and one SGD step. The defaults are MMAction2's published recipe
(slowonly_r50_8xb16-8x8x1-256e_imagenet-kinetics400-rgb: 77.30 top-1). Without a GPU it runs on the CPU.

Begin with `train_step`, `train_epoch` and `main`; settings stand before them. What keeps a run alive is in
runtime/.
"""

import argparse
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import evaluate
from runtime.distributed import autocast, processes, rank, show, world_size
from runtime.run import Run

# Settings, each with its default and its reason -----------------------------------------------------------

# What the demo sets otherwise: a network, a picture size and a length for a CPU, and its own data. It clips
# more, which holds back the image loss: its gradients are 20 times the videos' in the first steps.
DEMO = {
    'work_dir': 'work_dirs/demo',
    'layers': (1, 1, 1, 1),
    'width': 16,
    'size': 56,
    'epochs': 16,
    'images_per_gpu': 24,
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
    is_list = 'lines of "path label", or a folder of class folders'
    is_root = 'folder that its paths are below'
    add('--video-list', is_list, default=f'{kinetics}/kinetics400_train_list_videos.txt')
    add('--video-root', is_root, default=f'{kinetics}/videos_train')
    add('--image-list', is_list, default=f'{imagenet}/meta/train.txt')
    add('--image-root', is_root, default=f'{imagenet}/train')
    add('--val-list', 'the same, or lines of "id num_frames label"', default=evaluate.VAL_LIST)
    add('--val-root', is_root, default=evaluate.VAL_ROOT)
    add('--image-val-list', 'images are validated where it exists', default=evaluate.IMAGE_VAL_LIST)
    add('--image-val-root', is_root, default=evaluate.IMAGE_VAL_ROOT)
    add('--video-labels', 'class names, one a line; default: as the folders or labels in the list have it')
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
    add('--images-per-gpu', 'default: in proportion to the videos, 85 to 16', type=positive)
    add('--accumulate', 'batches a step: 8 on one GPU compute what 8 GPUs do', type=positive, default=1)
    add('--lr', 'peak learning rate, for 128 videos a step', type=positive_float, default=0.1)
    add('--auto-scale-lr', 'scale --lr by (videos per step) / 128', action='store_true')
    add('--momentum', 'of SGD', type=float, default=0.9)
    add('--weight-decay', 'on every parameter, BatchNorm and biases too', type=float, default=1e-4)
    add('--clip-norm', 'bounds the norm of all gradients together', type=positive_float, default=40)
    add('--video-only', 'no images, no image head: the plain SlowOnly to compare with', action='store_true')
    add('--image-only', 'no videos, no video head: to learn from images first', action='store_true')
    add('--no-flip', 'mirror nothing, for classes that know left from right', action='store_true')
    add('--init-2d', "start from a 2D ResNet's weights, inflated, or an --image-only run's", metavar='CKPT')
    add('--init', 'start from a checkpoint of this network; heads may have other classes', metavar='CKPT')

    group = parser.add_argument_group('run')
    add('--work-dir', 'checkpoints and logs', default='work_dirs/omni')
    add('--resume', 'go on from CKPT, or from the work folder', nargs='?', const='auto', metavar='CKPT')
    add('--seed', 'determines the whole run', type=int, default=0)
    add('--deterministic', 'repeatable on a GPU too, but slower', action='store_true')
    add('--precision', 'default: bf16 on a GPU that has it, else fp32', choices=('fp32', 'bf16', 'fp16'))
    add('--compile', 'torch.compile: minutes at the start, faster steps', action='store_true')
    add('--workers', 'loader processes; default: its share of the cores, at most 16', type=int)
    add('--no-validate', 'do not measure on the validation lists', action='store_true')
    add('--val-interval', 'epochs from one validation and checkpoint to the next', type=positive, default=4)
    add('--save-minutes', 'time from one checkpoint to the next', type=positive_float, default=10)
    add('--log-interval', 'steps per log line', type=positive, default=20)
    add('--max-bad', 'share of unreadable samples that ends the run', type=positive_float, default=0.01)

    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)
    return check(parser, argv)


# The method -----------------------------------------------------------------------------------------------


def learning_rate(
    step: int, steps_per_epoch: int, base_lr: float = 0.1, warmup_epochs: int = 34, epochs: int = 256
) -> float:
    """The rate of a step, counted from 0: linear from 0.1 of base_lr, reached in the last step of the
    warm-up, then a half cosine towards 0 (https://arxiv.org/abs/1608.03983, without restarts)."""
    warmup, total = warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    if step < warmup:
        return base_lr * (0.1 + 0.9 * step / max(warmup - 1, 1))
    return base_lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def make_optimizer(network: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD on all parameters, in one kernel."""
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum, weight_decay=weight_decay, fused=True)
    for parameter in network.parameters():  # else unset where the fused step skips the first update
        optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    return optimizer


def train_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: list[dict[str, data.Item]],
    seeds: list[int],
    device: torch.device,
    precision: str = 'fp32',
    clip_norm: float = 40,
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """One joint step on batches of `data.collate`: videos and images, one summed loss, one update.

    More than one batch is gradient accumulation: each is normalized by itself, as on a process of its own.
    `seeds` has one of dropout, the only random numbers here, for each. Returns of each batch `{source}_loss`
    and `{source}_top1`, and the norm of all gradients before clipping, on the device: nothing here waits for
    a GPU. Where the norm is not finite, no weight is changed.
    """
    results = []
    optimizer.zero_grad()
    for number, (batch, seed) in enumerate(zip(batches, seeds), 1):
        torch.manual_seed(seed)
        pixels = {source: item.pixels.to(device, non_blocking=True) for source, item in batch.items()}
        labels = {source: item.label.to(device, non_blocking=True) for source, item in batch.items()}
        net.require_backward_grad_sync = number == len(batches)  # by which DDP adds them up once
        with autocast(device, precision):
            logits = net(pixels)  # of videos (16, 400), of images (85, 1000)
            losses = {source: F.cross_entropy(logits[source], labels[source]) for source in batch}
            loss = sum(losses.values()) / len(batches)
        scaler.scale(loss).backward()  # the shared weights get the gradients of both
        results.append({})
        for source in batch:
            results[-1][f'{source}_loss'] = losses[source].detach()
            results[-1][f'{source}_top1'] = (logits[source].argmax(1) == labels[source]).float().mean()
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
    if precision != 'fp16':  # the scaler's part there: where it is not 0, the fused step changes nothing
        optimizer.found_inf = (~grad_norm.isfinite()).float()
    scaler.step(optimizer)
    scaler.update()
    return results, grad_norm


def train_epoch(run: Run) -> None:
    """The steps that are left of an epoch."""
    args = run.args
    for step in run.steps():
        batches = run.next_batches()
        run.between_steps(batches)  # all processes together: give up, save or stop?

        iteration = run.epoch * run.steps_per_epoch + step
        lr = learning_rate(iteration, run.steps_per_epoch, args.lr, args.warmup_epochs, args.epochs)
        for group in run.optimizer.param_groups:
            group['lr'] = lr
        mine = range(rank() * args.accumulate, (rank() + 1) * args.accumulate)  # of the step's batches
        seeds = [data.generator('dropout', args.seed, iteration, n).integers(2**62).item() for n in mine]
        results, grad_norm = train_step(
            run.net, run.optimizer, run.scaler, batches, seeds, run.device, run.precision, args.clip_norm
        )
        run.average_first_steps(iteration)  # the running statistics of a run from nothing
        run.count(step, batches, results, grad_norm)
        run.log_step(step, lr)


def validate(run: Run) -> dict[str, float]:
    """{'video_top1': ..., 'image_top5': ...} of each source that has a validation set."""
    result = {}
    for source in run.sources:
        if source.val is not None:
            title = f'validating {source.name}s'
            scores, labels, bad = evaluate.predict(
                run.network, source.name, source.val, run.precision, 16, run.workers, title
            )
            for line in bad:
                show(f'unreadable, counted as wrong: {line}')
            metrics = evaluate.accuracy(scores, labels)
            result |= {f'{source.name}_{key}': round(value, 4) for key, value in metrics.items()}
    return result


def main(argv: list[str] | None = None) -> nn.Module:
    args = parse_args(argv)
    with processes('train.py') as device:
        if args.auto_scale_lr:
            args.lr *= args.videos_per_gpu * args.accumulate * world_size() / 128
        run = Run(args, device, make_optimizer)
        while run.epoch < args.epochs:
            train_epoch(run)
            validating = run.is_checkpoint_epoch() and any(source.val for source in run.sources)
            if validating:
                run.save('latest.pth')  # so that a validation that fails loses nothing
            run.average_statistics()
            run.end_epoch(validate(run) if validating else {})
        run.close()
        if args.demo and not args.no_validate:
            show_held_out(run)
        images, val_list = (' --images', args.image_val_list) if args.image_only else ('', args.val_list)
        if val_list:
            show(f'\nNext: python evaluate.py --ckpt {run.folder}/latest.pth{images} --dump result.pkl')
    return run.network


def show_held_out(run: Run) -> None:
    """Print the demo's table: what the trained network makes of held-out files."""
    show(f'\n{"held-out":28}{"files":>8}{"chance":>8}{"top-1":>8}')
    args = run.args
    for source in run.sources:
        if source.val is None:
            continue
        title, dataset = f'{source.name}s, centre crop', source.val
        if source.name == 'video':
            title, clip = 'videos, 10 clips x 3 crops', (args.size, args.clip_len, args.frame_interval)
            dataset = data.VideoDataset(source.val.samples, 'test', *clip)
        scores, labels, _ = evaluate.predict(
            run.network, source.name, dataset, run.precision, 1, run.workers, 'testing'
        )
        top1 = evaluate.accuracy(scores, labels)['top1']
        show(f'{title:28}{len(labels):8}{1 / scores.shape[1]:8.1%}{top1:8.1%}')


def check(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The settings of a command line, where they go together; what depends on others filled in."""
    args = parser.parse_args(argv)
    for name in ('seed', 'warmup_epochs', 'workers', 'momentum', 'weight_decay'):
        if (getattr(args, name) or 0) < 0:
            parser.error(f'--{name.replace("_", "-")} must not be negative')
    if args.momentum >= 1:
        parser.error('--momentum must be below 1')
    if not args.work_dir:
        parser.error('--work-dir names a folder')
    if args.size % 7:
        parser.error('--size must be a multiple of 7, so that the short side, 8/7 of it, is a whole number')
    if args.init and args.init_2d:
        parser.error('--init and --init-2d exclude each other')
    if args.image_only and (args.video_only or args.auto_scale_lr):
        parser.error('--image-only leaves no videos for --video-only or --auto-scale-lr')
    if args.warmup_epochs is None:
        args.warmup_epochs = round(args.epochs * 34 / 256)
    if args.warmup_epochs > args.epochs:
        parser.error(f'--warmup-epochs {args.warmup_epochs} is more than --epochs {args.epochs}')
    args.layers = list(args.layers)
    for flag in ('video', 'val', 'image', 'image-val'):
        folder, root = (f'{flag}_{part}'.replace('-', '_') for part in ('list', 'root'))
        if os.path.isdir(getattr(args, folder)) and getattr(args, root) != parser.get_default(root):
            parser.error(f'--{flag}-list is a folder of class folders, --{flag}-root is for lists')
    # Own classes are not validated on the published sets; only a default may be missing.
    for train, val in (('video', 'val'), ('image', 'image_val')):
        is_default = {n: getattr(args, n) == parser.get_default(n) for n in (f'{train}_list', f'{val}_list')}
        missing = val == 'image_val' and not os.path.exists(args.image_val_list)
        if is_default[f'{val}_list'] and (not is_default[f'{train}_list'] or missing) and not args.demo:
            setattr(args, f'{val}_list', None)
    return args


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f'{text} is not above 0')
    return value


if __name__ == '__main__':
    main()
