"""Train one SlowOnly-R50 on videos and images together.

    python train.py --demo                           the whole run on a small set that it makes itself
    torchrun --nproc_per_node=8 train.py --resume    the published recipe on 8 GPUs; also resumes it
    python train.py --video-list train.txt --video-root videos --image-list images.txt --image-root images

Each step takes a batch of videos and a batch of images through the same weights, adds the two
cross-entropies, and does one backward pass and one SGD step. The defaults are MMAction2's published recipe
(slowonly_r50_8xb16-8x8x1-256e_imagenet-kinetics400-rgb: 77.30 top-1). Without a GPU it runs on the CPU.

Settings come first, then the method (`learning_rate`, `train_step`), then the run (`train`), from the lists
to the last checkpoint. runtime/ has the rest: processes, lists, checkpoints, signals, logging.
"""

import argparse
import math
import os
import shlex
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
import prepare
from model import MOMENTUM, OmniSlowOnly, running_statistics, set_momentum
from runtime import checkpoint, command, distributed, log
from runtime.distributed import rank, say, together, world_size
from runtime.guard import Guard
from runtime.sources import RECIPE, compare_data, fingerprints, open_sources

# Settings -------------------------------------------------------------------------------------------------

# The demo's own defaults: a small network, small pictures, few epochs. It clips at a lower norm because the
# images' gradients are at first 20 times as large as the videos'.
DEMO = {
    'work_dir': 'work_dirs/demo',
    'layers': [1, 1, 1, 1],
    'width': 16,
    'size': 56,
    'epochs': 12,
    'images_per_gpu': 24,
    'lr': 0.05,
    'clip_norm': 1.0,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command.Parser(__doc__)
    count, above_0 = command.number(int, 1), command.number(float, 0, above=True)
    from_0, share = command.number(int, 0), command.number(float, 0, 1)
    area = command.number(float, 0, 0.5, above=True)  # a wide picture has no larger crops

    add = parser.flags('data')
    add('--demo', 'make a small set below data/demo and train a small network on it', action='store_true')
    kinetics, imagenet = 'data/kinetics400', 'data/imagenet'
    list_help = 'lines of "path label", or a folder of class folders'
    root_help = 'folder that the paths in the list start from'
    add('--video-list', list_help, default=f'{kinetics}/kinetics400_train_list_videos.txt')
    add('--video-root', root_help, default=f'{kinetics}/videos_train')
    add('--image-list', list_help, default=f'{imagenet}/meta/train.txt')
    add('--image-root', root_help, default=f'{imagenet}/train')
    published = 'default: the published list, if the training list is the published one'
    add('--val-list', f'like --video-list, or lines of "id num_frames label"; {published}')
    add('--val-root', root_help, default=evaluate.VAL_ROOT)
    add('--image-val-list', f'like --image-list; {published} and it exists')
    add('--image-val-root', root_help, default=evaluate.IMAGE_VAL_ROOT)
    add('--video-labels', 'class names, one per line; default: those of the class folders, else numbers')
    add('--image-labels', 'the same for images')

    add = parser.flags('network')
    add('--layers', 'blocks per stage; the default is ResNet-50', type=count, nargs=4, default=[3, 4, 6, 3])
    add('--width', 'channels of the stem', type=count, default=64)
    add('--clip-len', 'frames of a clip', type=count, default=8)
    add('--frame-interval', 'frames from one to the next; 8 x 8 spans 2 seconds', type=count, default=8)
    add('--size', 'side of the crop, a multiple of 7: tests use 8/7 of it', type=count, default=224)

    add = parser.flags('recipe')
    add('--epochs', 'passes over the videos; many, to learn from scratch', type=count, default=256)
    add('--warmup-epochs', 'default: in proportion, 34 of 256', type=from_0)
    add('--videos-per-gpu', 'videos in a batch of each process', type=count, default=16)
    add('--images-per-gpu', 'default: in proportion to the videos, 85 to 16', type=count)
    add('--accumulate', 'batches per step: one GPU with 8 learns like 8 GPUs', type=count, default=1)
    add('--lr', 'peak learning rate, for 128 videos a step', type=above_0, default=0.1)
    add('--auto-scale-lr', 'scale --lr to the step: videos / 128, or images alone / 680', action='store_true')
    add('--momentum', 'of SGD', type=share, default=0.9)
    add('--weight-decay', 'on all parameters, biases too', type=share, default=1e-4)
    add('--clip-norm', 'limit on the norm of all gradients together', type=above_0, default=40)
    add('--video-only', 'no images, no image head: the plain SlowOnly to compare with', action='store_true')
    add('--image-only', 'no videos, no video head: to learn from images first', action='store_true')
    add('--min-area', 'smallest crop, as a share; small actions need 0.4', type=area, default=0.08)
    add('--no-flip', 'mirror nothing, for classes that know left from right', action='store_true')
    add('--init', 'start from a checkpoint, with its --width and --layers; heads may differ', metavar='CKPT')
    add('--init-2d', 'the same; a 2D ResNet is inflated', dest='init', metavar='CKPT')
    add('--freeze', 'train only the heads; the rest stays as in --init', action='store_true')

    add = parser.flags('run')
    add('--work-dir', 'checkpoints and logs', default='work_dirs/omni')
    add('--resume', 'go on with the run in the work folder, if there is one', action='store_true')
    add('--seed', 'determines the whole run', type=command.number(int, 0, 2**63), default=0)
    add('--deterministic', 'repeatable on a GPU too, but slower', action='store_true')
    add('--precision', 'default: bf16 if the GPU has it, else fp32', choices=('fp32', 'bf16', 'fp16'))
    add('--compile', 'torch.compile: minutes at the start, faster steps', action='store_true')
    add('--workers', 'loader processes; default: its share of the cores, up to 16', type=from_0)
    add('--no-validate', 'skip validation', action='store_true')
    add('--val-interval', 'epochs between validations and kept checkpoints', type=count, default=4)
    add('--save-minutes', 'minutes between saves of latest.pth', type=above_0, default=10)
    add('--log-interval', 'steps per log line', type=count, default=20)
    add('--max-bad', 'end if a larger share (and over 20) is unreadable', type=above_0, default=0.01)

    # Parsed twice: --demo and --init change the defaults of other flags.
    asked = parser.parse_known_args(argv)[0]
    if asked.demo:
        parser.set_defaults(**DEMO, **prepare.DEMO_FILES)
    if asked.init:  # the checkpoint's, see `checkpoint.fit_size`
        parser.set_defaults(layers=None, width=None, size=None, clip_len=None, frame_interval=None)
    return check_settings(parser, parser.parse_args(argv))


def check_settings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Refuse settings that exclude each other; fill in those that depend on others."""
    if args.size is not None and args.size % 7:
        parser.error('--size must be a multiple of 7, so that the short side, 8/7 of it, is a whole number')
    if args.image_only and args.video_only:
        parser.error('--image-only leaves no videos for --video-only')
    if args.warmup_epochs is None:
        args.warmup_epochs = round(args.epochs * 34 / 256)
    if args.warmup_epochs > args.epochs:
        parser.error(f'--warmup-epochs {args.warmup_epochs} is more than --epochs {args.epochs}')
    # The published validation sets fit the published training lists only.
    if args.val_list is None and args.video_list == parser.get_default('video_list'):
        args.val_list = evaluate.VAL_LIST
    published = args.image_list == parser.get_default('image_list')
    if args.image_val_list is None and published and os.path.exists(evaluate.IMAGE_VAL_LIST):
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
    for parameter in learning:  # else a skipped first step would leave them uninitialized
        optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    return optimizer


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: list[dict[str, data.Batch]],
    seeds: list[int],
    step: int,
    device: torch.device,
    precision: str = 'fp32',
    clip_norm: float = 40,
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """One joint step on batches of `data.collate`: videos and images, one summed loss, one update.

    Several batches mean gradient accumulation: each is treated as if another process had it. `seeds` are for
    the dropout of each batch; nothing else here is random. `step` counts from 0 through the run.

    Returns `{source}_loss` and `{source}_top1` of each batch, and the norm of all gradients before clipping,
    on the device: nothing here waits for a GPU. If the norm is not finite, no weight is changed.
    """
    set_momentum(network, step)
    statistics, results = running_statistics(network), []
    accumulating = len(batches) > 1 and len(statistics) > 0
    if accumulating:
        before = [value.clone() for value in statistics]
        averaged = [torch.zeros_like(value) for value in statistics]
    optimizer.zero_grad()
    for n, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
        torch.manual_seed(seed)
        if accumulating:  # every batch begins with the same statistics, as it would in another process
            torch._foreach_copy_(statistics, before)
        pixels = {source: part.pixels.to(device, non_blocking=True) for source, part in batch.items()}
        labels = {source: part.labels.to(device, non_blocking=True) for source, part in batch.items()}
        # DDP averages the gradients over processes after the last batch only; `no_sync()` sets this flag too.
        network.require_backward_grad_sync = n == len(batches) - 1
        # torch.compile would recompile for each momentum, so it waits until that is constant.
        settled = step * MOMENTUM >= 1
        stance = nullcontext() if settled else torch.compiler.set_stance('force_eager')
        with stance, distributed.autocast(device, precision):
            logits = network(pixels)  # of videos (16, 400), of images (85, 1000)
            losses = {source: F.cross_entropy(logits[source], labels[source]) for source in batch}
            loss = sum(losses.values()) / len(batches)
        scaler.scale(loss).backward()  # the shared weights get the gradients of both
        if accumulating:
            torch._foreach_add_(averaged, statistics, alpha=1 / len(batches))
        results.append({f'{name}_loss': value.detach() for name, value in losses.items()})
        for source in batch:
            results[-1][f'{source}_top1'] = (logits[source].argmax(1) == labels[source]).float().mean()
    if accumulating:
        torch._foreach_copy_(statistics, averaged)
    # Once an epoch would give the same, as the reference does it, because a moving average is linear.
    distributed.average(statistics)
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
    if precision != 'fp16':
        # A fused optimizer skips its update where this is 1, on the GPU, so nothing waits. It belongs to
        # GradScaler's protocol; in fp16 the scaler sets it.
        optimizer.found_inf = (~grad_norm.isfinite()).float()
    scaler.step(optimizer)
    scaler.update()
    return results, grad_norm


# The run --------------------------------------------------------------------------------------------------


def wrap(network: nn.Module, args: argparse.Namespace, sources: list, device: torch.device) -> nn.Module:
    """What `train_step` calls: the network, compiled if asked for, and in DistributedDataParallel if there
    are several processes. It shares the network's weights."""
    wrapped = network
    if args.compile:
        with together():
            distributed.check_compiler(device)
        # Without a forced layout, Inductor gives up channels-last at temporal convolutions that have fewer
        # outputs than inputs. CUDA graphs save 1,500 launches a step; with --accumulate a second batch would
        # overwrite the first one's gradients.
        options = {'force_layout_optimization': True, 'triton.cudagraphs': args.accumulate == 1}
        wrapped = torch.compile(wrapped, options=options)
    if world_size() > 1:
        gpu = [device.index] if device.type == 'cuda' else None
        wrapped = DistributedDataParallel(wrapped, gpu, gradient_as_bucket_view=True)
        # `train_step` averages the statistics. (The argument is deprecated, its successor needs torch 2.13.)
        wrapped.broadcast_buffers = False
        # DDP reorders its buckets, and so its sums, after its first backward pass. A pass on zeros triggers
        # that now, so that the first step after a restart adds up in the same order as any other. In eval
        # mode it changes no statistics.
        zeros = {s.name: torch.zeros(1, *s.train.shape, dtype=torch.uint8, device=device) for s in sources}
        with torch.compiler.set_stance('force_eager'):
            logits = wrapped.eval()(zeros)
            loss = sum(part.sum() for part in logits.values())
            loss.backward()
    return wrapped.train()


def load_batches(sampler: data.JointSampler, steps: range, my_batches: range, sources: list, workers: int):
    """An iterator over this process's batches of these steps, which loader workers prepare."""
    dataset = data.JointDataset({source.name: source.train for source in sources})
    batch_bytes = sum(source.per_gpu * math.prod(source.train.shape) for source in sources)
    keys = (sampler.batch(step, n) for step in steps for n in my_batches)
    options = {'batch_sampler': keys, 'collate_fn': data.collate}
    return iter(distributed.loader(dataset, workers, batch_bytes, len(my_batches), **options))


def train(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """A whole run, from the lists to the last checkpoint. Every process calls it, with the same settings."""
    precision, why = distributed.pick_precision(args.precision, device)
    workers = distributed.default_workers() if args.workers is None else args.workers
    distributed.set_deterministic(args.deterministic)

    # 1. Data and checkpoint. An error in one process inside `together` ends all of them with its line.
    with together():
        logger = log.Log(args.work_dir, device)  # makes the folder and locks it
        saved, path = checkpoint.find(args.resume, logger.folder, args.demo)
        given = checkpoint.fit_size(args, saved, path)  # the checkpoint of --init, if any; sets sizes in args
        sources = open_sources(args)
        sizes = {source.name: len(source.train) for source in sources}
        per_gpu = {source.name: source.per_gpu for source in sources}
        sampler = data.JointSampler(sizes, per_gpu, world_size() * args.accumulate, args.seed)
        if args.auto_scale_lr:
            args.lr *= sampler.per_step[sources[0].name] / RECIPE[sources[0].name]
        if saved:
            compare_data(saved, args, sources, path)
    digests = {source.name: fingerprints(source) for source in sources}
    where = [saved[key] for key in ('step', 'epoch', 'best')] if saved else None
    distributed.agree(args, precision=precision, lists=digests, state=where)

    # 2. The network with its first weights: random ones, a checkpoint's, or those that a flag names.
    torch.manual_seed(args.seed)
    classes = {'video_classes': 0, 'image_classes': 0}  # 0: no such head
    classes |= {f'{source.name}_classes': source.classes for source in sources}
    network = OmniSlowOnly(**classes, layers=args.layers, width=args.width).to(device)
    with together():
        if saved:
            checkpoint.load_into(network, saved['model'], path)
        else:
            checkpoint.first_weights(network, args, given, sources)
    if args.freeze:
        network.freeze_trunk()
    optimizer = make_optimizer(network, args.lr, args.momentum, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')

    # 3. The state of a run: steps done, epochs done and validated, the best top-1 with the set it belongs to.
    # The rate, the order of samples and all random numbers follow from the step and the settings, so a
    # checkpoint needs no state of a sampler or a random generator.
    step, epoch, best_top1, best_on = 0, 0, -1.0, None
    steps_per_epoch = sampler.steps_per_epoch
    if saved:  # by `save`, below
        with together():
            checkpoint.load_momentum(optimizer, saved['optimizer'], path)
        if saved['scaler']:
            scaler.load_state_dict(saved['scaler'])
        # Another number of processes means another number of steps an epoch; keep the fraction done.
        step, epoch = saved['step'] * steps_per_epoch // saved['steps_per_epoch'], saved['epoch']
        best_top1, best_on = saved['best']
    wrapped = wrap(network, args, sources, device)  # `network` is saved and validated, `wrapped` is trained

    my_batches = range(rank() * args.accumulate, (rank() + 1) * args.accumulate)  # of those of all processes
    computing = f'{device.type}, {precision} ({why}), {workers} workers'
    log.introduce(args, sources, sampler, computing, saved, step)
    del saved, given  # they hold copies of the weights
    with together():
        if args.demo and not args.resume and rank() == 0:  # a demo replaces an older one
            checkpoint.start_over(logger.folder)
    guard = Guard(logger.folder, args.save_minutes, args.max_bad)

    def save(*names: str) -> None:
        state = {
            'model': network.state_dict(),
            'optimizer': optimizer.state_dict(),  # its momentum is read back; rates and the like are settings
            'scaler': scaler.state_dict(),  # empty but in fp16
            'step': step,
            'steps_per_epoch': steps_per_epoch,  # the unit of `step`
            'epoch': epoch,
            'best': [best_top1, best_on],
            'settings': vars(args),  # evaluate.py reads sizes and lists; a resumed run says what has changed
            **{f'{source.name}_labels': source.labels for source in sources},
            'lists': digests,  # a resumed run must not give the same files other labels
        }
        with together():
            if rank() == 0:
                checkpoint.write(state, logger.folder, *names)

    # 4. The loop. Saving and stopping are asked for in one place, before each step. `ask`, `check`, `line`,
    # `save` and `validate` are collective: all processes must call them, in the same order.
    validated = [source.name for source in sources if source.val is not None]
    upcoming = None
    while epoch < args.epochs:
        end = (epoch + 1) * steps_per_epoch
        logger.begin(epoch, args.epochs, step, steps_per_epoch)
        if upcoming is None:
            steps = range(step, args.epochs * steps_per_epoch)
            upcoming = load_batches(sampler, steps, my_batches, sources, workers)
        while step < end:
            start = time.perf_counter()
            drawn = [next(upcoming) for _ in my_batches]
            logger.data_time += time.perf_counter() - start
            save_now, stop_signal = guard.ask(drawn, epoch)
            if save_now or stop_signal:
                logger.check()
                save('latest.pth')
            if stop_signal:
                guard.leave(stop_signal)

            lr = learning_rate(step, steps_per_epoch, args.lr, args.warmup_epochs, args.epochs)
            for group in optimizer.param_groups:
                group['lr'] = lr
            seeds = [data.generator('dropout', args.seed, step, n).integers(2**62).item() for n in my_batches]
            results, grad_norm = train_step(
                wrapped, optimizer, scaler, drawn, seeds, step, device, precision, args.clip_norm
            )
            step += 1
            logger.add(results, grad_norm)
            if (step - epoch * steps_per_epoch) % args.log_interval == 0 or step in (1, end):
                logger.line(lr, guard.unreadable)

        milestone = (epoch + 1) % args.val_interval == 0 or epoch + 1 == args.epochs
        if milestone and validated:
            save('latest.pth')  # a run that ends before its validation does can go on with that
        epoch += 1
        if milestone:
            upcoming = None  # next come fresh workers, because decoding leaves a little memory in use
            names = [f'epoch_{epoch}.pth', 'latest.pth']  # in this order: resuming tries latest.pth first
            if validated:
                result = evaluate.validate(network, sources, precision, workers)
                logger.validation(result)
                top1, val_set = result[f'{validated[0]}_top1'], digests[validated[0]][1]
                if top1 > best_top1 or val_set != best_on or not (logger.folder / 'best.pth').exists():
                    best_top1, best_on = top1, val_set
                    names.insert(0, 'best.pth')
            save(*names)
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
        with together():
            if args.demo and rank() == 0:
                prepare.make_demo('data/demo')
        network = train(args, device)
        ckpt = f'--ckpt {shlex.quote(args.work_dir)}/latest.pth'
        if args.demo and not args.no_validate:
            for kind, flag in (('video', ''), ('image', ' --images')):
                if network.head(kind) is not None:
                    say(f'\nevaluate.py {ckpt}{flag}')
                    evaluate.run(evaluate.parse_args(shlex.split(ckpt + flag)), device)
        example = 'YOUR_FILE'
        if args.demo and not args.image_only:
            example = 'data/demo/videos_val/dots_rising_000.mp4'
        say(f'\nNext: python evaluate.py {ckpt} {example}')
    return network


if __name__ == '__main__':
    main()
