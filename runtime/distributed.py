"""The processes of a run: device and precision, starting, agreeing, stopping together, loader workers.

Begin with `processes`, which every command's main opens. Without torchrun there is one process: nothing is
sent then, and `gather` and `add_up` give back what they got.
"""

import gc
import multiprocessing
import os
import signal
import sys
import traceback
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from runtime.parallel import cores


class UserError(ValueError):
    """The run cannot start or go on; the message says what is wrong, where, and what to do."""


DIED = 'a process of the run has died or hangs, of too little memory perhaps'


# Starting and ending --------------------------------------------------------------------------------------


@contextmanager
def processes(program: str):
    """Join the other processes of torchrun; `with processes('train.py') as device` has this one's device.

    Inside, a mistake of the user's (UserError, OSError) ends every process with one line and status 1, and so
    does the death of one of them or of a loader worker. Anything else shows its traceback.
    """
    open_outputs()
    advice = '; --resume goes on' if program == 'train.py' else ''
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # which ends the program without a traceback
    try:
        try:
            yield join(program)
        finally:
            end_workers()  # first, as the death of one would interrupt what is said below
            signal.signal(signal.SIGINT, before)
    except UserError as error:
        show(f'{program}: {error}', file=sys.stderr)
        leave(1)
    except (ConnectionError, EOFError) as error:  # a worker broke off while it handed over a batch
        print(f'{program}: {DIED}{advice} (DataLoader worker: {error})', file=sys.stderr)
        leave(1)
    except OSError as error:  # the log cannot be written, say
        print(f'{program}: {error}', file=sys.stderr)
        leave(1)
    except Exception as error:
        text = str(error)
        lost = text.startswith(('DataLoader', 'Pin memory')) or 'gloo' in text or 'NCCL' in text
        if isinstance(error, RuntimeError) and lost:
            print(f'{program}: {DIED}{advice} ({text.splitlines()[0]})', file=sys.stderr)
            leave(1)
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        leave(1)
    except SystemExit as stop:  # all ranks have agreed on it
        leave(stop.code)
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
            gc.collect()  # DDP's cycles hold its threads, which abort an interpreter that they outlive


def open_outputs() -> None:
    """Have both outputs take any file name, UTF-8 or not, and swallow all where a shell has closed them."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w'))
        if hasattr(getattr(sys, name), 'reconfigure'):
            getattr(sys, name).reconfigure(encoding='utf-8', errors='surrogateescape')


def leave(status: int) -> None:
    """End this process, at once where there are others. Leaving the group properly would wait for ranks that
    may never come (NCCL aborts only when all do), and hold back what is printed."""
    if not dist.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def join(program: str) -> torch.device:
    """This process's own GPU where there is one, else the CPU; joins the other processes under torchrun."""
    on_gpu, local_rank = torch.cuda.is_available(), int(os.environ.get('LOCAL_RANK', 0))
    device = torch.device('cuda', local_rank) if on_gpu else torch.device('cpu')
    if on_gpu:
        count, started = torch.cuda.device_count(), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        if started > count:
            line = f'{program}: {started} processes for the {count} GPUs here: --nproc_per_node={count}'
            sys.exit(line if local_rank == 0 else 1)
        torch.cuda.set_device(device)
        # "fp32" on a GPU is TF32, as convolutions have it by default. (The newer way to say it breaks
        # torch.compile before torch 2.11: pytorch issue 166387.)
        torch.backends.cuda.matmul.allow_tf32 = True
    if 'RANK' in os.environ:
        # gloo carries what lies on the CPU (flags, scores), so that no GPU has to be waited for
        backend = 'cpu:gloo,cuda:nccl' if on_gpu else 'gloo'
        store, rank, world_size = next(dist.rendezvous('env://'))
        if os.environ.get('GROUP_WORLD_SIZE') == '1':
            # torchrun keeps this store when it restarts the processes, which must not meet the old ones' keys
            # (pytorch issue 135712). On several nodes the counts may differ; docs/runs.md says what helps.
            store = dist.PrefixStore(f'start {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return device


def pick_precision(asked: str | None, device: torch.device) -> tuple[str, str]:
    """(precision, why): what was asked for, else bf16 on GPUs that compute in it, else fp32."""
    if asked:
        return asked, 'as asked'
    if device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False):
        return 'bf16', 'this GPU computes in it'
    return 'fp32', "the CPU's default" if device.type == 'cpu' else 'this GPU has no bf16'


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for a forward pass; nothing with fp32."""
    dtype = torch.float16 if precision == 'fp16' else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != 'fp32')


# Agreeing -------------------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value) -> list:
    """What each rank has, on all ranks."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def add_up(*numbers: int) -> list[int]:
    """The sums of the numbers over all ranks, which keeps them in step: where one stops or saves, all do."""
    sums = torch.tensor(numbers)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def agree(value, what: str) -> None:
    """UserError unless all ranks have the same value; `what` says in a few words what it is."""
    if gather(value) != [value] * world_size():
        raise UserError(f'the processes found different {what}; all nodes must share these')


def average(tensors: list[torch.Tensor]) -> None:
    """Replace tensors of one dtype and device by their means over all ranks, in one message."""
    if dist.is_initialized() and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        means = (flat / world_size()).split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means):
            tensor.copy_(mean.view_as(tensor))


@contextmanager
def together():
    """An OSError or ValueError of one rank becomes the UserError of all. No collective may stand inside: the
    others wait at the end of the block for the rank that is in trouble."""
    trouble = ''
    try:
        yield
    except (OSError, ValueError) as error:
        trouble = str(error) or type(error).__name__
    stop_together(trouble)


def stop_together(trouble: str) -> None:
    """Raise UserError on all ranks where one of them, called with a text, is in trouble."""
    for text in filter(None, gather(trouble)):
        raise UserError(text)


def show(text: str = '', file=None) -> None:
    """Print a line, on the main process only and above progress bars. A reader that has gone, as `head` does,
    ends nothing."""
    if rank():
        return
    file = file or sys.stdout
    try:
        tqdm.write(text, file=file)
        file.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


# Loader workers -------------------------------------------------------------------------------------------


def loader(dataset: Dataset, workers: int, **options) -> DataLoader:
    """A DataLoader whose workers are forked, so that they share the lists (Python 3.14 would start them from
    nothing, with a copy each), and leave stop signals to the main process."""
    if workers:
        # half an hour is as long as ranks wait for one another
        options |= {'worker_init_fn': ignore_stop_signals, 'multiprocessing_context': 'fork', 'timeout': 1800}
    return DataLoader(dataset, num_workers=workers, pin_memory=torch.cuda.is_available(), **options)


def default_workers() -> int:
    """Loader processes for this process: its share of the cores, at most 16 (the reference starts 12)."""
    return max(1, min(16, cores() // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


def ignore_stop_signals(worker_id: int) -> None:
    """A stop signal to all processes is the main one's to answer."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


def end_workers() -> None:
    """Kill what loader workers are left; a program that ends would wait for them forever otherwise, as they
    do not listen to SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader would report their death as an error
    for worker in multiprocessing.active_children():
        worker.kill()
