"""What a run reports: lines on the screen and in log.jsonl, and events if TensorBoard is installed."""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
from runtime import distributed
from runtime.distributed import UserError, locked, peak_memory, rank, say, world_size


class Log:
    """A run's progress bar and its log.jsonl, which the main process writes.

    Steps are added on the device; only `line` and `check` wait for a GPU. data_time is how long the loop
    waited for batches. A GPU need not have been idle then, because the loop runs ahead of it.

    Raises OSError if the folder cannot be made, the file cannot be written, or another run writes to it.
    """

    def __init__(self, folder: str, device: torch.device, frozen: bool = False):
        self.folder, self.device, self.frozen, self.board, self.bar = Path(folder), device, frozen, None, None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = open(self.folder / 'log.jsonl' if rank() == 0 else os.devnull, 'a', buffering=1)
        if rank() == 0 and not locked(self.file):
            raise OSError(f'{folder} is in use by a run; --work-dir takes another folder')
        self.skipped = 0  # skipped updates in a row

    def begin(self, epoch: int, epochs: int, step: int, end: int) -> None:
        """An epoch begins or goes on: the run has done `step` steps, and the epoch ends with step `end`."""
        if self.bar is None and rank() == 0:
            self.open_board(step)
        self.epoch, self.epochs, self.step, self.end = epoch, epochs, step, end
        self.steps, quiet = end // (epoch + 1), None if rank() == 0 else True  # steps of an epoch
        title, done = f'epoch {epoch + 1}/{epochs}', step - epoch * self.steps
        self.bar = tqdm(desc=title, total=self.steps, initial=done, leave=False, unit='step', disable=quiet)
        self.new_line()

    def open_board(self, step: int) -> None:
        """Write events from `step` on as well, if TensorBoard is installed."""
        with self.optional_board():
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder), purge_step=step + 1, flush_secs=10)

    @contextmanager
    def optional_board(self) -> Iterator[None]:
        """A failure inside turns TensorBoard off, with a line if it is installed."""
        try:
            yield
        except Exception as error:  # its dependencies fail in many ways
            if 'DataLoader' in str(error):  # its signal that a worker has died can come anywhere
                raise
            self.board = None
            if getattr(error, 'name', '') != 'tensorboard':
                say(f'no more TensorBoard events: {data.one_line(error)}')

    def new_line(self) -> None:
        """Begin a new line, and its clock."""
        self.rows, self.data_time, self.start = [], 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for a batch."""
        start = time.perf_counter()
        yield
        self.data_time += time.perf_counter() - start

    def add(self, batches: list[dict], results: list[dict[str, Tensor]], grad_norm: Tensor) -> None:
        """Record a step on these batches; `results` and `grad_norm` come from `train_step`."""
        paths = [path for batch in batches for part in batch.values() for path in part.paths]
        means = {key: torch.stack([result[key] for result in results]).mean() for key in results[0]}
        self.rows.append((self.step, paths, means, grad_norm))
        self.step += 1
        self.bar.update()

    def check(self) -> None:
        """End all ranks if a loss since the last line is not finite."""
        trouble = ''
        for step, paths, means, _ in self.rows:
            if not torch.stack([*means.values()]).isfinite().all():
                step -= self.epoch * self.steps
                trouble = (
                    f'loss is not finite in epoch {self.epoch + 1} step {step + 1}, rank {rank()}; no '
                    'checkpoint was affected. Try a lower --lr or --clip-norm, or look at '
                    f'its {len(paths)} files:\n  ' + '\n  '.join(paths[:5])
                ) + '\n  ...' * (len(paths) > 5)
                break
        distributed.stop_together(trouble)

    def line(self, lr: float, unreadable: int) -> None:
        """Write the means over all ranks since the last line; every rank calls it."""
        self.check()
        rows = [torch.stack([*means.values()]) for _, _, means, _ in self.rows]
        means = torch.stack(rows).mean(0)
        distributed.average([means])
        norms = torch.stack([norm for *_, norm in self.rows]).tolist()
        finite = [norm for norm in norms if math.isfinite(norm)]
        record = {'epoch': self.epoch + 1, 'step': self.step - self.epoch * self.steps, 'lr': lr}
        record |= dict(zip(self.rows[0][2], means.tolist()))
        record['grad_norm'] = sum(finite) / len(finite) if finite else math.nan
        record['skipped'] = len(norms) - len(finite)
        record['loss'] = sum(value for key, value in record.items() if key.endswith('_loss'))
        record['time'] = (time.perf_counter() - self.start) / len(rows)
        record['data_time'] = self.data_time / len(rows)
        if self.device.type == 'cuda':
            record['memory_mb'] = torch.cuda.max_memory_allocated() // 2**20
        else:
            record['memory_mb'] = peak_memory()
        record = {key: round(value, 4) if key != 'lr' else lr for key, value in record.items()}
        left = (self.epochs * self.steps - self.step) * record['time']
        record |= {'unreadable': unreadable, 'eta': str(timedelta(seconds=round(left)))}
        record |= {'frozen': True} if self.frozen else {}
        say(self.text(record))
        self.write(record, 'train')
        self.bar.set_postfix(loss=record['loss'], lr=f'{lr:.3g}', eta=record['eta'])
        for norm in norms:
            self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
            if self.skipped >= 50:
                raise UserError(
                    'the gradients of the last 50 steps are not finite, though the losses are: no weight was '
                    'changed. Try a lower --lr, or --precision fp32'
                )
        self.new_line()
        if self.step == self.end:
            self.bar.close()
            if unreadable:
                say(f'{unreadable} unreadable samples were replaced, see {self.folder}/bad_samples.txt')

    def text(self, record: dict) -> str:
        """A record in readable form."""
        sources = [key.removesuffix('_loss') for key in record if key.endswith('_loss')]
        losses = ', '.join(f'{source} {record[f"{source}_loss"]:.3f}' for source in sources)
        parts = [
            f'epoch {record["epoch"]}/{self.epochs} step {record["step"]}/{self.steps}',
            f'lr {record["lr"]:.4g}' + ' (heads only)' * self.frozen,
            f'loss {record["loss"]:.3f} ({losses})',
            'top-1 ' + ', '.join(f'{source} {record[f"{source}_top1"]:.1%}' for source in sources),
            f'grad {record["grad_norm"]:.2f}' + f' ({record["skipped"]} skipped)' * (record['skipped'] > 0),
            f'{record["time"]:.3f} s/step (data {record["data_time"]:.3f})',
            f'{record["memory_mb"]:.0f} MB' if record['memory_mb'] > 0 else 'memory unknown',
            f'eta {record["eta"]}',
        ]
        return '  '.join(parts)

    def write(self, record: dict, tag: str) -> None:
        """Write a record to log.jsonl, and its numbers as events."""
        # a gradient's norm can be infinite, which JSON cannot say
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        print(json.dumps(finite), file=self.file)
        with self.optional_board():
            for key, value in record.items() if self.board else ():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(f'{tag}/{key}', value, self.step)

    def validation(self, result: dict[str, float]) -> None:
        """Write the results of this epoch's validation."""
        self.bar.close()  # still open if nothing was left to train in the epoch
        self.write({'epoch': self.epoch + 1, 'mode': 'val', **result}, 'val')
        shown = '  '.join(f'{key} {value:.1%}' for key, value in result.items())
        say(f'epoch {self.epoch + 1}/{self.epochs} validation  {shown}')

    def close(self) -> None:
        with self.optional_board():
            if self.board:
                self.board.close()


def introduce(
    args: argparse.Namespace, sources: list, sampler, computing: str, saved: dict | None, step: int
) -> None:
    """Say what a run is about to do, and what has changed since its checkpoint."""
    say(f'{world_size()} x {computing} each, seed {args.seed}')
    for source in sources:
        seen = sampler.steps_per_epoch * sampler.per_step[source.name]
        say(f'an epoch sees {seen} {source.name}s, {seen / len(source.train):.3g} times the set')
        if source.val is None and not args.no_validate:
            flag = 'val' if source.name == 'video' else f'{source.name}-val'
            say(f'{source.name}s are not validated: no --{flag}-list')
    times = f'{world_size()} x ' + (f'{args.accumulate} x ' if args.accumulate > 1 else '')
    batch = ' and '.join(f'{times}{source.per_gpu} {source.name}s' for source in sources)
    steps = sampler.steps_per_epoch
    say(f'{steps} steps an epoch of {batch}, {args.epochs} epochs, learning rate {args.lr:g}')
    times = args.lr / 0.1 * 128 / sampler.per_step[sources[0].name]  # the demo needs more
    if times > 2 and sources[0].name == 'video' and not args.demo:
        advice = '' if args.auto_scale_lr else '; --auto-scale-lr makes it the same'
        say(f"the learning rate is {times:.1f} times the recipe's for so many videos a step{advice}")
    if args.freeze:
        say('frozen: only the heads learn, the rest stays as it is')
    say_cpu_cost(args, sources, computing)
    if args.compile:
        say('compiling: the first 100 steps of a run are not compiled, the next one takes minutes')
    if saved:
        harmless = ('work_dir', 'resume', 'init', 'init_2d', 'workers', 'save_minutes', 'log_interval')
        for key, value in vars(args).items():
            was = saved['settings'].get(key, value)
            if was != value is not None and key not in harmless:
                say(f'changed since the checkpoint: {key} {was} -> {value}')
        if steps != saved['steps_per_epoch']:
            say(
                f'{saved["steps_per_epoch"]} steps an epoch -> {steps}: going on after step {step % steps} '
                f'of epoch {step // steps + 1}'
            )
        if saved['epoch'] >= args.epochs:
            say(f'all {args.epochs} epochs are done: nothing is left to train')


def say_cpu_cost(args: argparse.Namespace, sources: list, computing: str) -> None:
    """Say what a step takes on a CPU, if that is long.

    A rule of thumb: the full network keeps 0.1 GB for each frame of 224x224, and learns from one in 0.6
    seconds on a core that computes 50 GFLOP/s.
    """
    frames = sum(source.per_gpu * math.prod(source.train.shape[1:-2]) for source in sources)
    frames *= (args.size / 224) ** 2 * sum(args.layers) / 16  # in frames of the full network
    memory, seconds = 0.1 * frames * args.width / 64, 0.6 * frames * (args.width / 64) ** 2
    seconds *= args.accumulate / torch.get_num_threads()
    if args.freeze:  # nothing is kept for a backward pass
        memory, seconds = memory / 10, seconds / 3
    if computing.startswith('cpu') and seconds > 10:
        say(
            f'on this CPU a step takes about {seconds:.0f} seconds and {memory:.0f} GB: --width 16 '
            '--size 112, or smaller --videos-per-gpu and --images-per-gpu, take less'
        )
