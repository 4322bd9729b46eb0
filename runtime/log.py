"""What a run says of itself: lines on the screen, in log.jsonl, and events where TensorBoard is installed."""

import errno
import fcntl
import json
import math
import os
import resource
import time
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from runtime.distributed import rank


def locked(file: TextIO) -> bool:
    """Lock an open file for this process, until that ends, however it ends; False where another has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # others mean a file system without locks
    return True


class Log:
    """A run's log.jsonl, which the main process writes, and what a line of it sums up.

    Steps are added on the device; reading is the only thing that waits for a GPU. data_time is how long the
    loop waited for batches. A GPU need not have been idle then, as the loop runs ahead of it.

    Raises OSError where the file cannot be written or another run writes to it.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device, self.board = folder, device, None
        self.file = open(folder / 'log.jsonl' if rank() == 0 else os.devnull, 'a', buffering=1)
        if rank() == 0 and not locked(self.file):
            raise OSError(f'{folder} is in use by a run; --work-dir takes another folder')
        self.reset()

    def open_board(self, steps: int) -> None:
        """Write TensorBoard's events as well, where that is installed, from `steps` on."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        if rank() == 0:
            self.board = SummaryWriter(str(self.folder), purge_step=steps + 1, flush_secs=10)

    def write(self, record: dict, iteration: int, tag: str) -> None:
        """Write one line; its numbers also as events."""
        # JSON has no infinity, which a gradient's norm can be
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        print(json.dumps(finite), file=self.file)
        for key, value in record.items() if self.board else ():
            if isinstance(value, (int, float)):
                self.board.add_scalar(f'{tag}/{key}', value, iteration)

    def reset(self) -> None:
        """Begin a new line, and its clock."""
        self.rows, self.data_time, self.start = [], 0.0, time.perf_counter()

    def add(self, step: int, files: list[str], results: list[dict], grad_norm: Tensor) -> None:
        """Add what `train_step` gave."""
        means = {key: torch.stack([result[key] for result in results]).mean() for key in results[0]}
        self.rows.append((step, files, means | {'grad_norm': grad_norm}))

    def not_finite(self) -> tuple[int, list[str]] | None:
        """The first step since the last reset whose loss is not finite, and its files."""
        for step, files, numbers in self.rows:
            losses = [value for key, value in numbers.items() if key.endswith('_loss')]
            if not torch.stack(losses).isfinite().all():
                return step, files
        return None

    def read(self) -> dict[str, float]:
        """Means per step since the last reset."""
        rows = [numbers for _, _, numbers in self.rows]
        means = torch.stack([torch.stack([*row.values()]) for row in rows]).mean(0).tolist()
        record = dict(zip(rows[0], means))
        record['loss'] = sum(value for key, value in record.items() if key.endswith('_loss'))
        record['time'] = (time.perf_counter() - self.start) / len(self.rows)
        record['data_time'] = self.data_time / len(self.rows)
        if self.device.type == 'cuda':
            record['memory_mb'] = torch.cuda.max_memory_allocated() // 2**20
        else:
            record['memory_mb'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
        return {key: round(value, 4) for key, value in record.items()}

    def line(self, record: dict, epochs: int, steps: int) -> str:
        """A record as one reads it."""
        sources = [key.removesuffix('_loss') for key in record if key.endswith('_loss')]
        losses = ', '.join(f'{source} {record[f"{source}_loss"]:.3f}' for source in sources)
        parts = [
            f'epoch {record["epoch"]}/{epochs} step {record["step"]}/{steps}',
            f'lr {record["lr"]:.4g}',
            f'loss {record["loss"]:.3f} ({losses})',
            'top-1 ' + ', '.join(f'{source} {record[f"{source}_top1"]:.1%}' for source in sources),
            f'grad {record["grad_norm"]:.2f}',
            f'{record["time"]:.3f} s/step (data {record["data_time"]:.3f})',
            f'{record["memory_mb"]:.0f} MB',
            f'eta {record["eta"]}',
        ]
        return '  '.join(parts)
