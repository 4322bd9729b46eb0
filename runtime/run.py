"""The life of one run of train.py: opening, resuming, what is asked between steps, saving.

Begin with `Run`. A run's state is two things, `epoch` and `done`, beside the weights, the momentum and the
running statistics; whatever else a step depends on follows from them and the settings.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import prepare
from model import OmniSlowOnly
from runtime import checkpoint, distributed
from runtime.distributed import UserError, add_up, gather, rank, show, together, world_size
from runtime.log import Log
from runtime.sources import compare_data, open_sources


class Run:
    """What learns (`network`, and `net`, the same behind DDP and torch.compile), what it learns from
    (`sources`), how (`optimizer`, `scaler`), and how far it is.

    epoch: counted from 0. done: {source: samples that all ranks together have drawn}, of the first source in
    this epoch, of the others since the run began, as `data.JointSampler` has it.
    All public methods are called on all ranks alike.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, make_optimizer: Callable):
        self.args, self.device, self.folder = args, device, Path(args.work_dir)
        self.precision, why = distributed.pick_precision(args.precision, device)
        if args.deterministic:
            os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
            torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = not args.deterministic
        self.workers = distributed.default_workers() if args.workers is None else args.workers

        with together():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.log = Log(self.folder, device)
            if args.demo and rank() == 0:
                prepare.make_demo('data/demo')
        with together():
            saved, path = find_checkpoint(args, self.folder)
            self.sources = open_sources(args)
            self.sampler = data.JointSampler(
                {source.name: len(source.train) for source in self.sources},
                {source.name: source.per_gpu for source in self.sources},
                rank(),
                world_size(),
                args.seed,
                args.epochs,
                args.accumulate,
            )
            if saved is not None:
                compare_data(saved, args, self.sources, path)
            self.network = self._new_network(saved, path)
        lists = [d and d.samples.fingerprint for s in self.sources for d in (s.train, s.val)]
        found = saved and (saved['epoch'], saved['done']), lists
        if gather(found) != [found] * world_size():
            raise UserError(
                f'the processes found different checkpoints or lists; all nodes must share {self.folder} and '
                'the lists'
            )
        self.from_nothing = not (args.init or args.init_2d)
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.epoch, self.done, self.best = 0, dict(self.sampler.done), -1.0
        self._prepare_network()
        self.optimizer = make_optimizer(self.network, args.lr, args.momentum, args.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == 'fp16')
        if saved is not None:
            self._go_on_from(saved)
        elif args.demo and not args.resume and rank() == 0:  # over an older demo
            for old in [*checkpoint.ours(self.folder), self.folder / 'bad_samples.txt']:
                old.unlink(missing_ok=True)
            self.log.file.truncate(0)

        self.loader = distributed.loader(
            data.JointDataset({source.name: source.train for source in self.sources}),
            self.workers,
            batch_sampler=self.sampler,
            collate_fn=data.collate,
        )
        self.log.open_board(self.epoch * self.steps_per_epoch + self.sampler.steps_done(self.done))
        self._say_what_comes(why)

        self.stop, self.trouble = distributed.StopSignals(), ''
        bad_list = self.folder / 'bad_samples.txt'
        self.bad_list = open(bad_list, 'a+', 1, 'utf-8', 'surrogateescape')
        self.bad_list.seek(0)
        self.listed = set(self.bad_list)
        self._start_loader()
        self.last_save = time.monotonic()

    # Opening ----------------------------------------------------------------------------------------------

    def _new_network(self, saved: dict | None, path: str) -> OmniSlowOnly:
        """The network with its first weights: random ones, those that a flag names, or a checkpoint's."""
        args = self.args
        torch.manual_seed(args.seed)
        classes = {'video_classes': 0, 'image_classes': 0}
        classes |= {f'{source.name}_classes': source.classes for source in self.sources}
        network = OmniSlowOnly(**classes, layers=args.layers, width=args.width)
        if saved is not None:
            checkpoint.load_into(network, saved['model'], path)
        elif args.init_2d:
            checkpoint.load_2d(network, args.init_2d)
            show(f'starting from {args.init_2d}: its backbone; the heads are new')
        elif args.init:
            given = checkpoint.load(args.init)
            # As many classes can still be others, or the same in another order.
            known = {source.name: given.get(f'{source.name}_labels') for source in self.sources}
            other = [s.name for s in self.sources if s.labels and known[s.name] not in (None, s.labels)]
            fresh = checkpoint.load_all_but_other_heads(network, given['model'], args.init, other)
            heads = f', with a new head for {" and ".join(f"{name}s" for name in fresh)}' if fresh else ''
            show(f'starting from {args.init}{heads}')
        return network

    def _prepare_network(self) -> None:
        """Put it on the device, behind torch.compile and DDP where they are wanted."""
        network = self.network.to(self.device)
        # Forced, as Inductor would leave channels-last where a convolution over three frames narrows.
        options = {'force_layout_optimization': True}
        self.net = torch.compile(network, options=options) if self.args.compile else network
        if world_size() > 1:
            device_ids = [self.device.index] if self.device.type == 'cuda' else None
            self.net = DistributedDataParallel(self.net, device_ids, gradient_as_bucket_view=True)
            self.net.broadcast_buffers = False  # every rank keeps its own running statistics
            # In its first backward pass DDP learns in which order gradients come, and orders its sums by it
            # from then on. Done once on nothing, the first step after a restart adds up in that order too.
            nothing = {s.name: torch.zeros(1, *s.train.shape, device=self.device) for s in self.sources}
            with torch.compiler.set_stance('force_eager'):
                sum(logits.sum() for logits in self.net.eval()(nothing).values()).backward()
            self.net.train()

    def _go_on_from(self, saved: dict) -> None:
        """Take up a checkpoint's state; say what has changed since."""
        self.epoch = saved['epoch']
        self.done = {source: saved['done'].get(source, 0) for source in self.done}
        self.best, self.from_nothing = saved['best'], saved.get('from_nothing', True)
        self.optimizer.load_state_dict(saved['optimizer'])
        for group in self.optimizer.param_groups:  # which come with the checkpoint's settings
            group.update(momentum=self.args.momentum, weight_decay=self.args.weight_decay)
        if saved['scaler']:
            self.scaler.load_state_dict(saved['scaler'])
        statistics = saved['statistics']
        if len(statistics) != world_size():
            name = self.sampler.first
            left = f'{self.sampler.sizes[name] - self.done[name]} {name}s of epoch {self.epoch + 1}'
            show(f'{len(statistics)} processes -> {world_size()}: the other {left} are dealt out anew')
            statistics = statistics.mean(0).expand(world_size(), -1)
        set_statistics(self.network, statistics[rank()])
        harmless = ('work_dir', 'resume', 'init', 'init_2d', 'workers', 'save_minutes', 'log_interval')
        for key, value in vars(self.args).items():
            was = saved['settings'].get(key, value)
            if was != value is not None and key not in harmless:
                show(f'changed since the checkpoint: {key} {was} -> {value}')

    def _say_what_comes(self, why: str) -> None:
        args, sources = self.args, self.sources
        show(
            f'{world_size()} x {self.device.type}, {self.precision} ({why}), {self.workers} workers each, '
            f'seed {args.seed}'
        )
        data_text = ' and '.join(f'{len(s.train)} {s.name}s in {s.classes} classes' for s in sources)
        show(f'training on {data_text}')
        for source in sources:
            if source.val is None and not args.no_validate:
                flag = 'val' if source.name == 'video' else f'{source.name}-val'
                show(f'{source.name}s are not validated: no --{flag}-list')
        times = f'{world_size()} x ' + (f'{args.accumulate} x ' if args.accumulate > 1 else '')
        batch = ' and '.join(f'{times}{s.per_gpu} {s.name}s' for s in sources)
        show(
            f'{self.steps_per_epoch} steps an epoch of {batch}, {args.epochs} epochs, '
            f'learning rate {args.lr:g}'
        )
        for source in sources:
            seen = self.steps_per_epoch * self.sampler.per_step[source.name]
            show(f'an epoch sees {seen} {source.name}s, {seen / len(source.train):.3g} times the set')
        times = args.lr / 0.1 * 128 / self.sampler.per_step[sources[0].name]  # more is what the demo needs
        if times > 2 and sources[0].name == 'video' and not args.demo:
            show(
                f"the learning rate is {times:.1f} times the recipe's for so many {sources[0].name}s a step; "
                '--auto-scale-lr makes it the same'
            )
        if args.compile:
            show('compiling: the first steps take minutes')
        if self.epoch >= args.epochs:
            show(f'all {args.epochs} epochs are done: nothing is left to train')

    def _start_loader(self) -> None:
        self.sampler.epoch, self.sampler.done = self.epoch, self.done
        self.batches = iter(self.loader)

    # Steps ------------------------------------------------------------------------------------------------

    def steps(self):
        """Yield the steps left of this epoch, counted from 0, under a progress bar."""
        first = self.sampler.steps_done(self.done)
        self.last_step = first + self.sampler.steps_left(self.done)
        self.unreadable = 0
        self.statistics = flatten(self.network)
        self.log.reset()
        title, quiet = f'epoch {self.epoch + 1}/{self.args.epochs}', None if rank() == 0 else True
        steps = range(first, self.last_step)
        with tqdm(
            steps, title, self.last_step, leave=False, initial=first, unit='step', disable=quiet
        ) as self.bar:
            yield from self.bar
        if self.unreadable:
            show(f'{self.unreadable} unreadable samples were replaced, see {self.folder}/bad_samples.txt')

    def next_batches(self) -> list[dict[str, data.Item]]:
        """The loader's next --accumulate batches; none if one cannot be had: `between_steps` tells all."""
        start = time.perf_counter()
        try:
            return [next(self.batches) for _ in range(self.args.accumulate)]
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1]
            if 'in a row are unreadable' not in last:
                raise
            self.trouble = last.removeprefix('RuntimeError: ')
            return []
        finally:
            self.log.data_time += time.perf_counter() - start

    def between_steps(self, batches: list[dict[str, data.Item]]) -> None:
        """What one rank has met since the last step, all of them act on: give up, save, or stop."""
        bad = [line for batch in batches for item in batch.values() for line in item.bad]
        asked = self.stop.asks()
        due = rank() == 0 and time.monotonic() - self.last_save > 60 * self.args.save_minutes
        in_trouble, due, terminated, interrupted, count = add_up(
            bool(self.trouble), due, asked == signal.SIGTERM, asked == signal.SIGINT, len(bad)
        )
        if in_trouble:
            distributed.stop_together(self.trouble)
        self._note_unreadable(bad, count)
        if due or terminated or interrupted:
            self.check_losses()
            self.save('latest.pth')
        if terminated or interrupted:
            signum = signal.SIGTERM if terminated else signal.SIGINT
            show(f'stopped by {signum.name} and saved; --resume goes on from here')
            sys.exit(128 + signum)

    def _note_unreadable(self, lines: list[str], count: int) -> None:
        """Name this rank's unreadable files, each once; too many on all ranks together end the run."""
        for line in lines:
            if f'{line}\n' not in self.listed:
                self.listed.add(f'{line}\n')
                print(line, file=self.bad_list)
        self.unreadable += count
        steps = self.sampler.steps_done(self.done) + 1
        drawn = steps * sum(self.sampler.per_step.values())
        if self.unreadable > max(self.args.max_bad * drawn, 20):
            raise UserError(
                f'{self.unreadable} of the {drawn} samples drawn in this epoch are unreadable, more than '
                f'--max-bad {self.args.max_bad:g} allows; {self.folder}/bad_samples.txt lists them'
            )

    def average_first_steps(self, iteration: int) -> None:
        """After each of the first 100 steps of a run from nothing: see `average_evenly`."""
        if self.from_nothing and iteration < 100:
            average_evenly(self.network, self.statistics, iteration, self.args.accumulate)
            self.statistics = flatten(self.network)

    def count(self, step: int, batches: list, results: list[dict], grad_norm: Tensor) -> None:
        """A step is done; `results` and `grad_norm` are those of `train_step`."""
        files = [path for batch in batches for item in batch.values() for path in item.path]
        self.log.add(step, files, results, grad_norm)
        self.done = self.sampler.after_step(self.done)

    def check_losses(self) -> None:
        """Stop all ranks where a loss since the last log line is not finite."""
        trouble = ''
        if found := self.log.not_finite():
            step, files = found
            trouble = (
                f'loss is not finite in epoch {self.epoch + 1} step {step + 1}, rank {rank()}; neither the '
                'weights nor the checkpoints were touched by it. A lower --lr or --clip-norm may help, or a '
                f'look at its {len(files)} files:\n  ' + '\n  '.join(files[:5]) + '\n  ...' * (len(files) > 5)
            )
        distributed.stop_together(trouble)

    def log_step(self, step: int, lr: float) -> None:
        """Every --log-interval steps, a line with the means since the last one."""
        if (step + 1) % self.args.log_interval and step + 1 != self.last_step:
            return
        self.check_losses()
        iteration = self.epoch * self.steps_per_epoch + step + 1
        record = {'epoch': self.epoch + 1, 'step': step + 1, 'lr': lr, **self.log.read()}
        remaining = self.args.epochs * self.steps_per_epoch - iteration
        eta = timedelta(seconds=round(remaining * record['time']))
        record |= {'unreadable': self.unreadable, 'eta': str(eta)}
        self.log.reset()
        show(self.log.line(record, self.args.epochs, self.steps_per_epoch))
        self.log.write(record, iteration, 'train')
        self.bar.set_postfix(loss=record['loss'], lr=f'{lr:.3g}', eta=record['eta'])

    # Between epochs ---------------------------------------------------------------------------------------

    def average_statistics(self) -> None:
        """Give every rank the mean of all ranks' running statistics, as the reference does after an epoch."""
        set_statistics(self.network, gather_statistics(self.network).mean(0))

    def is_checkpoint_epoch(self) -> bool:
        """Whether this epoch ends with a validation and a checkpoint of its own."""
        return (self.epoch + 1) % self.args.val_interval == 0 or self.epoch + 1 == self.args.epochs

    def end_epoch(self, result: dict[str, float]) -> None:
        """Log the epoch's validation, if there was one, and save; the next epoch begins."""
        if result:
            record = {'epoch': self.epoch + 1, 'mode': 'val', **result}
            self.log.write(record, (self.epoch + 1) * self.steps_per_epoch, 'val')
            shown = '  '.join(f'{key} {value:.1%}' for key, value in result.items())
            show(f'epoch {self.epoch + 1}/{self.args.epochs} validation  {shown}')
        at_checkpoint = self.is_checkpoint_epoch()
        self.epoch, self.done = self.epoch + 1, self.sampler.after_epoch(self.done)
        if at_checkpoint:
            names = [f'epoch_{self.epoch}.pth']
            top1 = result.get(f'{self.sources[0].name}_top1', -1)
            if top1 > self.best:
                self.best = top1
                names.append('best.pth')
            # latest.pth comes last: once a run can go on from it, the others are there
            self.save(*names, 'latest.pth')
            if rank() == 0:
                for number, path in list(checkpoint.epochs(self.folder).items())[3:]:
                    if number < self.epoch:
                        path.unlink(missing_ok=True)
            if self.epoch < self.args.epochs:  # with fresh workers, as decoding leaves a little memory in use
                self._start_loader()

    def save(self, *names: str) -> None:
        """Save the run's state under these names."""
        statistics = gather_statistics(self.network)
        with together():
            if rank() == 0:
                state = {
                    'model': self.network.state_dict(),
                    'optimizer': self.optimizer.state_dict(),
                    'scaler': self.scaler.state_dict(),
                    'statistics': statistics,
                    'epoch': self.epoch,
                    'done': self.done,
                    'best': self.best,
                    'from_nothing': self.from_nothing,
                    'settings': vars(self.args),
                    **{f'{source.name}_labels': source.labels for source in self.sources},
                    'lists': {source.name: source.train.samples.fingerprint for source in self.sources},
                }
                checkpoint.write(state, self.folder, *names)
        self.last_save = time.monotonic()

    def close(self) -> None:
        """Let go of DDP, the log's events and the signals."""
        self.net = self.network
        if self.log.board:
            self.log.board.close()
        for signum in (signal.SIGTERM, signal.SIGINT):  # there is nothing left to save
            signal.signal(signum, signal.SIG_DFL)


# Opening a run --------------------------------------------------------------------------------------------


def find_checkpoint(args: argparse.Namespace, folder: Path) -> tuple[dict | None, str]:
    """What --resume asks for and its path: the file named, or the newest good one in the work folder.

    Without --resume a folder that holds a run is refused; the demo starts anew over a demo. Raises OSError or
    ValueError where what is asked for cannot be had.
    """
    if args.resume and args.resume != 'auto':
        saved = checkpoint.load_run(args.resume)
        if checkpoint.ours(folder) and Path(args.resume).absolute().parent != folder.absolute():
            raise ValueError(
                f'{folder} holds a run: --resume alone goes on with it, --work-dir takes another folder'
            )
        return saved, args.resume
    if args.resume:
        saved, path = checkpoint.newest(folder, show)
        show(f'resuming from {path}' if saved else f'nothing to resume in {folder}: starting afresh')
        return saved, path
    if checkpoint.ours(folder):
        if not (args.demo and checkpoint.newest(folder, show)[0]['settings'].get('demo')):
            raise ValueError(
                f'{folder} holds a run: --resume goes on with it, --work-dir takes another folder'
            )
    return None, ''


# Running statistics ---------------------------------------------------------------------------------------


def running_statistics(network: nn.Module) -> list[tuple[Tensor, float]]:
    """Its BatchNorms' running means and variances, each with the momentum of its updates."""
    return [
        (buffer, module.momentum)
        for module in network.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if 'running_' in name
    ]


def flatten(network: nn.Module) -> Tensor:
    """All running statistics as one vector, float (N,)."""
    return torch.cat([buffer.flatten() for buffer, _ in running_statistics(network)])


def set_statistics(network: nn.Module, flat: Tensor) -> None:
    """The inverse of `flatten`."""
    buffers = [buffer for buffer, _ in running_statistics(network)]
    for buffer, values in zip(buffers, flat.split([buffer.numel() for buffer in buffers])):
        buffer.copy_(values.view_as(buffer))


def gather_statistics(network: nn.Module) -> Tensor:
    """The running statistics of all ranks, float (ranks, N), on the CPU of every rank."""
    return torch.stack(gather(flatten(network).cpu()))


def average_evenly(network: nn.Module, before: Tensor, step: int, batches: int) -> None:
    """Make the running statistics the plain mean of those of steps 0 to `step`, given the ones before `step`,
    which has moved them by so many batches.

    As the recipe has it, a batch with momentum 0.01 moves them by a hundredth, so that a short run would be
    evaluated with what is left of the initial 0 and 1. Once that is more than a mean would, nothing changes.
    """
    momentum = [torch.full((buffer.numel(),), value) for buffer, value in running_statistics(network)]
    moved = 1 - (1 - torch.cat(momentum)) ** batches
    weight = (1 / (moved * (step + 1))).clamp(min=1).to(before.device)
    set_statistics(network, before.lerp(flatten(network), weight))
