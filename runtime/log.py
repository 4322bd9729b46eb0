"""What a run reports: lines on the screen and in log.jsonl, and events if TensorBoard is installed."""

import argparse
import json
import math
import os
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from runtime import distributed
from runtime.distributed import locked, peak_memory, rank, say, world_size, writing
from runtime.sources import RECIPE


class Log:
    """A run's progress bar and its log.jsonl, which the main process writes.

    Steps are added on the device; only `line` and `check` wait for a GPU. data_time is how long the loop
    waited for batches. A GPU need not have been idle then, because the loop runs ahead of it.

    Raises OSError if the folder cannot be made, the file cannot be written, or another run writes to it.
    """

    def __init__(self, folder: str, device: torch.device):
        self.folder, self.device, self.board, self.bar = Path(folder), device, None, None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = open(self.folder / 'log.jsonl' if rank() == 0 else os.devnull, 'a', buffering=1)
        if rank() == 0 and not locked(self.file):
            raise OSError(f'{folder} is in use by a run; --work-dir takes another folder')

    def begin(self, epoch: int, epochs: int, step: int, steps: int) -> None:
        """An epoch of `steps` steps begins or goes on; the run has done `step` steps."""
        if self.bar is None and rank() == 0:
            self.open_board(step)
        self.epoch, self.epochs, self.step, self.steps = epoch, epochs, step, steps
        title, done = f'epoch {epoch + 1}/{epochs}', step - epoch * steps
        quiet = None if rank() == 0 else True  # None: only if the output is not a terminal
        self.bar = tqdm(desc=title, total=steps, initial=done, leave=False, unit='step', disable=quiet)
        self.new_line()

    def open_board(self, step: int) -> None:
        """Write events from `step` on as well, if TensorBoard is installed."""
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder), purge_step=step + 1, flush_secs=10)

    def new_line(self) -> None:
        """Begin a new line, and its clock."""
        self.results, self.norms, self.data_time, self.start = [], [], 0.0, time.perf_counter()

    def add(self, results: list[dict[str, Tensor]], grad_norm: Tensor) -> None:
        """Record a step; `results` and `grad_norm` come from `train_step`."""
        self.results += results
        self.norms.append(grad_norm)
        self.step += 1
        self.bar.update()

    def check(self) -> None:
        """End all ranks if a loss since the last line is not finite."""
        losses = [value for result in self.results for key, value in result.items() if key.endswith('_loss')]
        trouble = ''
        if losses and not torch.stack(losses).isfinite().all():
            last = self.step - self.epoch * self.steps
            where = f'epoch {self.epoch + 1}, steps {last - len(self.norms) + 1} to {last}, rank {rank()}'
            trouble = f'loss is not finite in {where}; no checkpoint has it; try a lower --lr or --clip-norm'
        distributed.stop_together(trouble)

    def line(self, lr: float, unreadable: int) -> None:
        """Write the means over all ranks since the last line; every rank calls it."""
        self.check()
        keys = dict.fromkeys(key for result in self.results for key in result)
        of_each = [torch.stack([result[key] for result in self.results if key in result]) for key in keys]
        means = torch.stack([values.mean() for values in of_each])
        distributed.average([means])
        norms = torch.stack(self.norms).tolist()
        finite = [norm for norm in norms if math.isfinite(norm)]
        record = {'epoch': self.epoch + 1, 'step': self.step - self.epoch * self.steps, 'lr': lr}
        record |= dict(zip(keys, means.tolist()))
        record['grad_norm'] = sum(finite) / len(finite) if finite else math.nan
        record['skipped'] = len(norms) - len(finite)
        record['loss'] = sum(value for key, value in record.items() if key.endswith('_loss'))
        record['time'] = (time.perf_counter() - self.start) / len(norms)
        record['data_time'] = self.data_time / len(norms)
        on_gpu = self.device.type == 'cuda'
        record['memory_mb'] = torch.cuda.max_memory_allocated() // 2**20 if on_gpu else peak_memory()
        record = {key: round(value, 4) if key != 'lr' else lr for key, value in record.items()}
        left = timedelta(seconds=round((self.epochs * self.steps - self.step) * record['time']))
        # The first step takes longer than others, so it does not tell when the run ends.
        record |= {'unreadable': unreadable, 'eta': str(left) if self.step > 1 else 'unknown'}
        say(self.text(record))
        self.write(record, 'train')
        self.bar.set_postfix(loss=record['loss'], lr=f'{lr:.3g}', eta=record['eta'])
        self.new_line()
        if self.step == (self.epoch + 1) * self.steps:
            self.bar.close()
            if unreadable:
                say(f'{unreadable} unreadable samples were replaced, see {self.folder}/bad_samples.txt')

    def text(self, record: dict) -> str:
        """A record in readable form."""
        losses = ', '.join(f'{k[:-5]} {v:.3f}' for k, v in record.items() if k.endswith('_loss'))
        top1 = ', '.join(f'{k[:-5]} {v:.1%}' for k, v in record.items() if k.endswith('_top1'))
        skipped = f' ({record["skipped"]} skipped)' if record['skipped'] else ''
        return (
            f'epoch {record["epoch"]}/{self.epochs} step {record["step"]}/{self.steps}  '
            f'lr {record["lr"]:.4g}  loss {record["loss"]:.3f} ({losses})  top-1 {top1}  '
            f'grad {record["grad_norm"]:.2f}{skipped}  {record["time"]:.3f} s/step '
            f'(data {record["data_time"]:.3f})  {record["memory_mb"]} MB  eta {record["eta"]}'
        )

    def write(self, record: dict, tag: str) -> None:
        """Write a record to log.jsonl, and its numbers as events."""
        # a gradient's norm can be infinite, which JSON cannot say
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with writing(self.folder / 'log.jsonl'):
            print(json.dumps(finite), file=self.file)
        if self.board is not None:
            for key, value in record.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(f'{tag}/{key}', value, self.step)

    def validation(self, result: dict[str, float]) -> None:
        """Write the results of this epoch's validation."""
        self.bar.close()  # still open if nothing was left to train in the epoch
        self.write({'epoch': self.epoch + 1, 'mode': 'val', **result}, 'val')
        shown = '  '.join(f'{key} {value:.1%}' for key, value in result.items())
        say(f'epoch {self.epoch + 1}/{self.epochs} validation  {shown}')

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def introduce(
    args: argparse.Namespace, sources: list, sampler, computing: str, saved: dict | None, step: int
) -> None:
    """Say what a run is about to do, and what has changed since its checkpoint."""
    steps = sampler.steps_per_epoch
    say(f'{world_size()} x {computing} each, seed {args.seed}')
    for source in sources:
        seen = steps * sampler.per_step[source.name]
        say(f'an epoch sees {seen} {source.name}s, {seen / len(source.train):.3g} times the set')
        if source.val is None:
            say(f'{source.name}s are not validated')
        elif len(source.val) < 200:
            points = 100 / len(source.val)
            say(f'validation has {len(source.val)} {source.name}s: one of them is {points:.1f} points')
    batches = f'{world_size()} x {args.accumulate}' if args.accumulate > 1 else world_size()
    samples = ' and '.join(f'{batches} x {source.per_gpu} {source.name}s' for source in sources)
    say(f'{steps} steps an epoch of {samples}, {args.epochs} epochs, learning rate {args.lr:g}')
    say('top-1 in training is of augmented crops; validation lags in the first hundreds of steps')
    first = sources[0].name
    times = args.lr / 0.1 * RECIPE[first] / sampler.per_step[first]
    if times > 2 and not (args.demo or args.auto_scale_lr):
        line = f"the learning rate is {times:.1f} times the recipe's for so many {first}s a step"
        say(f'{line}; --auto-scale-lr makes it the same')
    if computing.startswith('cpu') and args.width >= 64:
        say('on a CPU a step of so large a network takes minutes: see "On a small machine" in README.md')
    if args.compile:
        say('compiling: the first 100 steps of a run are not compiled, the next one takes minutes')
    if saved is None:
        wanted = 300 if args.init or args.demo else 1000  # a new head learns sooner than a network
        if args.epochs * steps < wanted:
            enough = math.ceil(wanted / steps)
            say(f'{args.epochs * steps} steps are few; --epochs {enough} makes {wanted}')
        return

    harmless = ('work_dir', 'resume', 'init', 'workers', 'save_minutes', 'log_interval')
    for key, value in vars(args).items():
        was = saved['settings'].get(key, value)
        if key not in harmless and value is not None and value != was:
            say(f'changed since the checkpoint: {key} {was} -> {value}')
    if steps != saved['steps_per_epoch']:
        place = f'step {step % steps} of epoch {step // steps + 1}'
        say(f'{saved["steps_per_epoch"]} steps an epoch -> {steps}: going on after {place}')
    if saved['epoch'] >= args.epochs:
        say(f'all {args.epochs} epochs are done: nothing is left to train')
