"""Train one SlowOnly-R50 on videos and images together.

    python train.py --demo                           the whole run on a small set that it makes itself
    torchrun --nproc_per_node=8 train.py --resume    the published recipe on 8 GPUs; also resumes it
    python train.py --video-list train.txt --video-root videos --image-list images.txt --image-root images

Each step takes a batch of videos and a batch of images through the same weights, adds the two
cross-entropies, and does one backward pass and one SGD step. The defaults are MMAction2's published recipe
(slowonly_r50_8xb16-8x8x1-256e_imagenet-kinetics400-rgb: 77.30 top-1). Without a GPU it runs on the CPU.

Settings come first, then the method (`learning_rate`, `train_step`), then the run (`train`), from the lists
to the last checkpoint. runtime/ has the rest: processes, checkpoints, signals, logging.
"""

import argparse
import math
import os
import shlex
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
import prepare
from model import EVEN_STEPS, OmniSlowOnly, running_statistics, set_momentum
from runtime import checkpoint, command, distributed, log
from runtime.distributed import rank, say, together, world_size
from runtime.guard import Guard
from runtime.sources import compare_data, fingerprint, open_sources

# Settings -------------------------------------------------------------------------------------------------

# The demo's own defaults: a small network, small pictures, few epochs, its own data. It clips at a lower norm
# because the images' gradients are at first 20 times as large as the videos'.
DEMO = {
    'work_dir': 'work_dirs/demo',
    'layers': [1, 1, 1, 1],
    'width': 16,
    'size': 56,
    'epochs': 20,
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


def settings(parser: argparse.ArgumentParser, title: str) -> Callable:
    """A function that adds a flag to a group of its own in the help."""
    group = parser.add_argument_group(title)

    def add(flag: str, reason: str, **options) -> None:
        shown = ' (default: %(default)s)' if 'default' in options else ''
        group.add_argument(flag, help=reason + shown, **options)

    return add


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command.Parser(__doc__)

    count, above_0 = command.number(int, 1), command.number(float, 0, above=True)
    add = settings(parser, 'data')
    add('--demo', 'make a small set below data/demo and train a small network on it', action='store_true')
    kinetics, imagenet = 'data/kinetics400', 'data/imagenet'
    is_list = 'lines of "path label", or a folder of class folders'
    is_root = 'folder that the paths in the list start from'
    add('--video-list', is_list, default=f'{kinetics}/kinetics400_train_list_videos.txt')
    add('--video-root', is_root, default=f'{kinetics}/videos_train')
    add('--image-list', is_list, default=f'{imagenet}/meta/train.txt')
    add('--image-root', is_root, default=f'{imagenet}/train')
    published = 'default: the published list, if the training list is the published one'
    add('--val-list', f'the same, or lines of "id num_frames label"; {published}')
    add('--val-root', is_root, default=evaluate.VAL_ROOT)
    add('--image-val-list', f'the same for images; {published} and it exists')
    add('--image-val-root', is_root, default=evaluate.IMAGE_VAL_ROOT)
    add('--video-labels', 'class names, one per line; default: those of the class folders, else numbers')
    add('--image-labels', 'the same for images')

    add = settings(parser, 'network')
    add('--layers', 'blocks per stage; the default is ResNet-50', type=count, nargs=4, default=[3, 4, 6, 3])
    add('--width', 'channels of the stem', type=count, default=64)
    add('--clip-len', 'frames of a clip', type=count, default=8)
    add('--frame-interval', 'from one frame to the next; 8 x 8 spans 2 seconds', type=count, default=8)
    add('--size', 'side of the crop, a multiple of 7: tests use 8/7 of it', type=count, default=224)

    add = settings(parser, 'recipe')
    add('--epochs', 'many, because everything is learned from scratch', type=count, default=256)
    add('--warmup-epochs', 'default: in proportion, 34 of 256', type=command.number(int, 0))
    add('--videos-per-gpu', 'videos in a batch of each process', type=count, default=16)
    add('--images-per-gpu', 'default: in proportion to the videos, 85 to 16', type=count)
    add('--accumulate', 'batches per step: one GPU with 8 learns like 8 GPUs', type=count, default=1)
    add('--lr', 'peak learning rate, for 128 videos a step', type=above_0, default=0.1)
    add('--auto-scale-lr', 'scale --lr by (videos per step) / 128', action='store_true')
    add('--momentum', 'of SGD', type=command.number(float, 0, 1), default=0.9)
    add('--weight-decay', 'on all parameters, biases too', type=command.number(float, 0, 1), default=1e-4)
    add('--clip-norm', 'limit on the norm of all gradients together', type=above_0, default=40)
    add('--video-only', 'no images, no image head: the plain SlowOnly to compare with', action='store_true')
    add('--image-only', 'no videos, no video head: to learn from images first', action='store_true')
    add('--no-flip', 'mirror nothing, for classes that know left from right', action='store_true')
    add('--init-2d', "start from a 2D ResNet's weights, inflated, or an --image-only run's", metavar='CKPT')
    add('--init', 'start from a checkpoint, with its --width and --layers; heads may differ', metavar='CKPT')
    add('--freeze', 'train only the heads; the rest stays as in --init', action='store_true')

    add = settings(parser, 'run')
    add('--work-dir', 'checkpoints and logs', default='work_dirs/omni')
    add('--resume', 'resume the run in the work folder, or start it', action='store_true')
    add('--seed', 'determines the whole run', type=command.number(int, 0, 2**63), default=0)
    add('--deterministic', 'repeatable on a GPU too, but slower', action='store_true')
    add('--precision', 'default: bf16 if the GPU has it, else fp32', choices=('fp32', 'bf16', 'fp16'))
    add('--compile', 'torch.compile: minutes at the start, faster steps', action='store_true')
    add(
        '--workers',
        'loader processes; default: its share of the cores, up to 16',
        type=command.number(int, 0),
    )
    add('--no-validate', 'do not measure on the validation lists', action='store_true')
    add('--val-interval', 'epochs between validations and kept checkpoints', type=count, default=4)
    add('--save-minutes', 'minutes between saves of latest.pth', type=above_0, default=10)
    add('--log-interval', 'steps per log line', type=count, default=20)
    add('--max-bad', 'end at a larger share (and over 20) of bad samples', type=above_0, default=0.01)

    asked = parser.parse_known_args(argv)[0]
    if asked.demo:
        parser.set_defaults(**DEMO)
    if asked.init or asked.init_2d:
        parser.set_defaults(**dict.fromkeys(checkpoint.SIZES))  # None: the checkpoint's, see `fit_size`
    return check(parser, parser.parse_args(argv))


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Refuse settings that exclude each other; fill in those that depend on others."""
    if not args.work_dir:
        parser.error('--work-dir must not be empty')
    if args.size is not None and args.size % 7:
        parser.error('--size must be a multiple of 7, so that the short side, 8/7 of it, is a whole number')
    if args.init and args.init_2d:
        parser.error('--init and --init-2d exclude each other')
    if args.image_only and (args.video_only or args.auto_scale_lr):
        parser.error('--image-only leaves no videos for --video-only or --auto-scale-lr')
    if args.warmup_epochs is None:
        args.warmup_epochs = round(args.epochs * 34 / 256)
    if args.warmup_epochs > args.epochs:
        parser.error(f'--warmup-epochs {args.warmup_epochs} is more than --epochs {args.epochs}')
    for flag in ('video', 'val', 'image', 'image-val'):
        list_name, root = (f'{flag}_{part}'.replace('-', '_') for part in ('list', 'root'))
        if os.path.isdir(getattr(args, list_name) or '') and getattr(args, root) != parser.get_default(root):
            parser.error(f'--{flag}-list is a folder of class folders, --{flag}-root is for lists')
    # The published validation sets fit the published training lists only.
    if args.val_list is None and args.video_list == parser.get_default('video_list'):
        args.val_list = evaluate.VAL_LIST
    own_images = args.image_list != parser.get_default('image_list')
    if args.image_val_list is None and not own_images and os.path.exists(evaluate.IMAGE_VAL_LIST):
        args.image_val_list = evaluate.IMAGE_VAL_LIST
    return args


# The method -----------------------------------------------------------------------------------------------


def learning_rate(
    step: int, steps_per_epoch: int, base_lr: float = 0.1, warmup_epochs: int = 34, epochs: int = 256
) -> float:
    """The rate of a step, counted from 0: a linear warm-up, from 0.1 * base_lr to base_lr in its last step;
    then a half cosine towards 0 (https://arxiv.org/abs/1608.03983, without restarts)."""
    warmup, total = warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    if step < warmup:
        return base_lr * (0.1 + 0.9 * step / max(warmup - 1, 1))
    return base_lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def make_optimizer(network: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD on all parameters that are not frozen, in one kernel."""
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr, momentum, weight_decay=weight_decay, fused=True)
    for parameter in learning:  # else unset if the fused step skips the first update
        optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    return optimizer


def train_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: list[dict[str, data.Batch]],
    seeds: list[int],
    device: torch.device,
    precision: str = 'fp32',
    clip_norm: float = 40,
    seen: int = 2**31,
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """One joint step on batches of `data.collate`: videos and images, one summed loss, one update.

    Several batches mean gradient accumulation: each is normalized by itself, as if another process had it.
    `seeds` are for the dropout of each batch; nothing else here is random. `seen` is how many batches this
    process has trained on before; see `set_momentum`.

    Returns `{source}_loss` and `{source}_top1` of each batch, and the norm of all gradients before clipping,
    on the device: nothing here waits for a GPU. If the norm is not finite, no weight is changed.
    """
    results = []
    optimizer.zero_grad()
    for number, (batch, seed) in enumerate(zip(batches, seeds, strict=True), 1):
        torch.manual_seed(seed)
        pixels = {source: part.pixels.to(device, non_blocking=True) for source, part in batch.items()}
        labels = {source: part.labels.to(device, non_blocking=True) for source, part in batch.items()}
        net.require_backward_grad_sync = number == len(batches)  # DDP's `no_sync` for all but the last
        set_momentum(net, seen + number, len(batches))
        # torch.compile would recompile for each momentum, so it starts once that is constant.
        early = seen + number <= EVEN_STEPS * len(batches)
        eager = torch.compiler.set_stance('force_eager') if early else nullcontext()
        with eager, distributed.autocast(device, precision):
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
    if precision != 'fp16':  # fp16's scaler sets it; the fused step does nothing unless it is 0
        optimizer.found_inf = (~grad_norm.isfinite()).float()
    scaler.step(optimizer)
    scaler.update()
    return results, grad_norm


# The run --------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """A whole run, from the lists to the last checkpoint. Every process calls it, with the same settings."""
    if args.auto_scale_lr:
        args.lr *= args.videos_per_gpu * args.accumulate * world_size() / 128
    precision, why = distributed.pick_precision(args.precision, device)
    workers = distributed.default_workers() if args.workers is None else args.workers
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # makes cuBLAS deterministic
    torch.use_deterministic_algorithms(args.deterministic)
    torch.backends.cudnn.benchmark = not args.deterministic

    # Data and checkpoint. An error in one process inside `together` ends all of them with its line.
    with together():
        logger = log.Log(args.work_dir, device, args.freeze)  # makes the folder and locks it
        if args.demo and rank() == 0:
            prepare.make_demo('data/demo')
    with together():
        saved, path = checkpoint.find(args.resume, logger.folder, args.demo)
        checkpoint.fit_size(args, saved, path)
        sources = open_sources(args)
        sizes = {source.name: len(source.train) for source in sources}
        per_gpu = {source.name: source.per_gpu for source in sources}
        sampler = data.JointSampler(sizes, per_gpu, world_size() * args.accumulate, args.seed)
        if saved:
            compare_data(saved, args, sources, path)
    lists = {s.name: [own and fingerprint(own.files) for own in (s.train, s.val)] for s in sources}
    found = saved and [saved[key] for key in ('step', 'epoch', 'best')]
    own = ('_list', '_root', '_labels', '_dir', 'workers')  # these may differ between nodes
    settings = {key: value for key, value in vars(args).items() if not key.endswith(own)}
    distributed.agree((found, lists, precision, settings), 'settings, lists or checkpoints')

    # The network with its first weights: random ones, a checkpoint's, or those that a flag names.
    torch.manual_seed(args.seed)
    classes = {'video_classes': 0, 'image_classes': 0} | {f'{s.name}_classes': s.classes for s in sources}
    network = OmniSlowOnly(**classes, layers=args.layers, width=args.width)
    with together():
        if saved:
            checkpoint.load_into(network, saved['model'], path)
        else:
            checkpoint.first_weights(network, args, sources, sampler.steps_per_epoch)
    network.to(device)
    if args.freeze:
        network.freeze_trunk()
    statistics = running_statistics(network)
    optimizer = make_optimizer(network, args.lr, args.momentum, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')

    # The state of a run: steps done, epochs done and validated, the best top-1 with the set it belongs to.
    # The rate, the order of samples and all random numbers follow from the step and the settings.
    step, epoch, best = 0, 0, [-1.0, None]
    steps_per_epoch = sampler.steps_per_epoch
    if saved:  # by `save`, below
        with together():
            checkpoint.load_momentum(optimizer, saved['optimizer'], path)
        if saved['scaler']:
            scaler.load_state_dict(saved['scaler'])
        # With other GPUs an epoch has other steps: the share that is done stays the same.
        step, epoch = saved['step'] * steps_per_epoch // saved['steps_per_epoch'], saved['epoch']
        best = saved['best']

    wrapped = network  # `network` is saved and validated, `wrapped` is trained
    if args.compile:
        # Inductor would leave channels-last where a convolution over three frames narrows. CUDA graphs save
        # 1,500 launches a step; with --accumulate a second batch would overwrite the first one's gradients.
        options = {'force_layout_optimization': True, 'triton.cudagraphs': args.accumulate == 1}
        wrapped = torch.compile(wrapped, options=options)
    if world_size() > 1:
        gpu = [device.index] if device.type == 'cuda' else None
        wrapped = DistributedDataParallel(wrapped, gpu, gradient_as_bucket_view=True)
        wrapped.broadcast_buffers = False  # as an argument it is deprecated; the new one needs torch 2.13
        # DDP reorders its buckets, and so its sums, after its first backward pass. A pass on zeros triggers
        # that now, so that the first step after a restart adds up in the same order as any other.
        nothing = {source.name: torch.zeros(1, *source.train.shape, device=device) for source in sources}
        with torch.compiler.set_stance('force_eager'):
            sum(logits.sum() for logits in wrapped.eval()(nothing).values()).backward()
    wrapped.train()

    mine = range(rank() * args.accumulate, (rank() + 1) * args.accumulate)  # this process's batches of a step
    dataset = data.JointDataset({source.name: source.train for source in sources})

    def load_from(first: int):
        keys = (sampler.batch(s, n) for s in range(first, args.epochs * steps_per_epoch) for n in mine)
        return iter(distributed.loader(dataset, workers, batch_sampler=keys, collate_fn=data.collate))

    computing = f'{device.type}, {precision} ({why}), {workers} workers'
    log.introduce(args, sources, sampler, computing, saved, step)
    del saved
    with together():
        if args.demo and not args.resume and rank() == 0:  # a demo replaces an older demo
            checkpoint.start_over(logger.folder)
    guard = Guard(logger.folder, args.save_minutes, args.max_bad)

    def save(*names: str) -> None:
        state = {
            'model': network.state_dict(),
            'optimizer': optimizer.state_dict(),
            'scaler': scaler.state_dict(),
            'step': step,
            'steps_per_epoch': steps_per_epoch,
            'epoch': epoch,
            'best': best,
            'settings': vars(args),
            **{f'{source.name}_labels': source.labels for source in sources},
            'lists': lists,
        }
        with together():
            if rank() == 0:
                checkpoint.write(state, logger.folder, *names)
        guard.saved()

    batches = None
    if epoch >= args.epochs:  # nothing is left to train, but the folder may be a new one
        save('latest.pth')
    while epoch < args.epochs:
        end = (epoch + 1) * steps_per_epoch
        logger.begin(epoch, args.epochs, step, end)
        if batches is None:
            batches = load_from(step)
        while step < end:
            with logger.waiting():
                drawn = guard.draw(batches, args.accumulate)
            save_now, stop = guard.ask(drawn, epoch)  # all processes together, once a step
            if save_now or stop:
                logger.check()
                save('latest.pth')
            if stop:
                guard.leave(stop)

            lr = learning_rate(step, steps_per_epoch, args.lr, args.warmup_epochs, args.epochs)
            for group in optimizer.param_groups:
                group['lr'] = lr
            seeds = [data.generator('dropout', args.seed, step, n).integers(2**62).item() for n in mine]
            options = device, precision, args.clip_norm, step * args.accumulate
            results, grad_norm = train_step(wrapped, optimizer, scaler, drawn, seeds, *options)
            distributed.average(statistics)  # BatchNorm's, which DDP leaves alone
            step += 1
            logger.add(drawn, results, grad_norm)
            if (step - epoch * steps_per_epoch) % args.log_interval == 0 or step == end:
                logger.line(lr, guard.unreadable)

        keep = (epoch + 1) % args.val_interval == 0 or epoch + 1 == args.epochs
        names = [f'epoch_{epoch + 1}.pth', 'latest.pth']  # latest.pth last: resuming tries it first
        if keep:
            batches = None  # next come fresh workers, because decoding leaves a little memory in use
        if keep and (validated := [source.name for source in sources if source.val is not None]):
            save('latest.pth')  # so that a failed validation loses nothing
            result = evaluate.validate(network, sources, precision, workers)
            logger.validation(result)
            top1, own = result[f'{validated[0]}_top1'], lists[validated[0]][1]
            if top1 > best[0] or own != best[1] or not (logger.folder / 'best.pth').exists():
                best = [top1, own]
                names.insert(0, 'best.pth')
        epoch += 1
        if keep:
            save(*names)
            if rank() == 0:
                checkpoint.keep_last(logger.folder, epoch)
    guard.close()
    logger.close()
    return network


def main(argv: list[str] | None = None) -> nn.Module:
    args = parse_args(argv)
    with distributed.processes('train.py') as device:
        if args.demo and device.type == 'cpu' and 'OMP_NUM_THREADS' not in os.environ:
            # Two threads take 0.6 of the time for so small a network. But if another program shares the two
            # cores, they wait for each other and take 12 times as long.
            torch.set_num_threads(1)
        network = train(args, device)
        ckpt = ['--ckpt', f'{args.work_dir}/latest.pth']
        sets = [] if args.image_only or not args.val_list else [ckpt]
        sets += [] if args.video_only or not args.image_val_list else [[*ckpt, '--images']]
        for line in sets if args.demo and not args.no_validate else []:
            views = '' if '--images' in line else '  (30 views of each video; the validations above take one)'
            say(f'\nevaluate.py {shlex.join(line)}{views}')
            evaluate.run(evaluate.parse_args(line), device)
        own = 'YOUR.jpg' if args.image_only else 'YOUR.mp4'
        if args.demo:
            file = 'images_val/dots_000.jpg' if args.image_only else 'videos_val/dots_rising_000.mp4'
            own = f'data/demo/{file}  # or {own}'
        say(f'\nNext: python evaluate.py {shlex.join(ckpt)} {own}')
        if sets:
            say(f'Next: python evaluate.py {shlex.join([*sets[0], "--dump", "result.pkl"])}')
    return network


if __name__ == '__main__':
    main()
