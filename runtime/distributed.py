"""The processes of a run: starting, agreeing, stopping together, loader workers.

Begin with `processes`, which main opens. Without torchrun there is one process, and nothing is sent.
"""

import argparse
import fcntl
import gc
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# Forked workers share the lists, spawned ones copy them. On macOS the system's libraries crash when forked.
CONTEXT = multiprocessing.get_context('spawn' if sys.platform == 'darwin' else 'fork')
# A scheduler's end or warning, Ctrl-C, a closed terminal
STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
PATIENCE = timedelta(minutes=30)  # how long processes wait for one another, and for a batch


class UserError(ValueError):
    """The run cannot start or go on; the message says what is wrong, where, and what to do."""


# Starting -------------------------------------------------------------------------------------------------


@contextmanager
def processes(program: str) -> Iterator[torch.device]:
    """Join the other processes of torchrun; `with processes('train.py') as device` gives this one's device.

    Inside, a user's mistake (UserError, OSError) ends every process with one line and status 1. So does the
    death of a process or of a loader worker. A bug shows its traceback.
    """
    open_outputs()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which ends the program without a traceback
    try:
        try:
            yield join(program)
        finally:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else DataLoader reports their death
            for worker in multiprocessing.active_children():
                worker.kill()  # it ignores SIGTERM, by which Python would end it
    except SystemExit as stop:  # all ranks have agreed on it
        status = stop.code
    except Exception as error:
        line, status = one_line_about(error), 1
        if not line and not dist.is_initialized():
            raise
        text = f'{program}: {line}' if line else traceback.format_exc()
        say(text, sys.stderr, everywhere=not isinstance(error, UserError))
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
            gc.collect()  # DDP's cycles hold its threads, which abort an interpreter that they outlive
        return
    if not dist.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    os._exit(status)  # leaving the group properly would wait for ranks that may never come


def open_outputs() -> None:
    """Make both outputs accept any file name, UTF-8 or not, and swallow all if a shell has closed them."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w'))
        if hasattr(getattr(sys, name), 'reconfigure'):
            getattr(sys, name).reconfigure(encoding='utf-8', errors='surrogateescape')


def join(program: str) -> torch.device:
    """This process's own GPU if there is one, else the CPU. Under torchrun it joins the other processes."""
    device, backend = torch.device('cpu'), 'gloo'
    if torch.cuda.is_available():
        local_rank, count = int(os.environ.get('LOCAL_RANK', '0')), torch.cuda.device_count()
        started = int(os.environ.get('LOCAL_WORLD_SIZE', '1'))
        if started > count:
            line = f'{program}: {started} processes for the {count} GPUs here: --nproc_per_node={count}'
            sys.exit(line if local_rank == 0 else 1)
        device, backend = torch.device('cuda', local_rank), 'cpu:gloo,cuda:nccl'
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # "fp32" on a GPU is TF32, as convolutions have it already
    if 'RANK' in os.environ or 'WORLD_SIZE' in os.environ:
        join_others(program, backend)
        return device
    tasks = os.environ.get('SLURM_STEP_NUM_TASKS', os.environ.get('SLURM_NTASKS', '1'))
    if tasks != '1':
        unset = 'for a single process unset SLURM_NTASKS and SLURM_STEP_NUM_TASKS'
        raise UserError(f'one of {tasks} tasks of srun: start one torchrun per node; {unset}')
    return device


def join_others(program: str, backend: str) -> None:
    """Join the other processes at MASTER_ADDR:MASTER_PORT, where rank 0 or torchrun keeps a common store.

    Raises UserError if a variable is wrong or the port is in use.
    """
    all_here = threading.Event()

    def say_that_it_waits() -> None:
        seconds = 10
        while not all_here.wait(seconds):
            say(f'{program}: rank {own_rank} of {processes} waits for the others at {host}:{port}')
            seconds = 60

    try:
        own_rank, processes, port = (int(os.environ[key]) for key in ('RANK', 'WORLD_SIZE', 'MASTER_PORT'))
        host = os.environ['MASTER_ADDR']
        if not 0 <= own_rank < processes:
            raise ValueError(f'ranks are 0 to {processes - 1}, not {own_rank}')
        threading.Thread(target=say_that_it_waits, daemon=True).start()
        is_server = own_rank == 0 and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True'
        store = dist.TCPStore(host, port, None, is_server, PATIENCE, wait_for_workers=False)
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).partition('\n')[0]
        names = 'RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT'
        raise UserError(f'cannot join others ({reason}): torchrun sets {names}; check or unset all') from None
    if os.environ.get('GROUP_WORLD_SIZE') == '1':
        # torchrun keeps this store when it restarts the processes, which must not see the old ones' keys
        # (pytorch issue 135712). On several nodes the counts may differ; docs/runs.md says what helps.
        store = dist.PrefixStore(f'start {os.environ.get("TORCHELASTIC_RESTART_COUNT")}', store)
    # gloo carries what lies on the CPU (flags, scores), so that nothing waits for a GPU
    dist.init_process_group(backend, store=store, rank=own_rank, world_size=processes)
    all_here.set()


def pick_precision(asked: str | None, device: torch.device) -> tuple[str, str]:
    """(precision, why): what was asked for, else bf16 on GPUs that compute in it, else fp32."""
    if asked:
        return asked, 'as asked'
    if device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False):
        return 'bf16', 'this GPU supports it'
    return 'fp32', "the CPU's default" if device.type == 'cpu' else 'this GPU has no bf16'


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for a forward pass; nothing with fp32."""
    dtype = torch.float16 if precision == 'fp16' else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != 'fp32')


def check_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile does not work here, long before the network is compiled."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # a compiler's faults have many types
        reason = str(getattr(error, 'inner_exception', error)).strip().splitlines()[0]
        raise UserError(f'--compile does not work on this machine ({reason}); leave it out') from None


def set_deterministic(on: bool) -> None:
    """Make a run on a GPU repeatable bit for bit, or let cuDNN try which of its kernels is fastest."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # makes cuBLAS deterministic
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = not on


# Agreeing -------------------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value) -> list:
    """The values of all ranks, on each of them."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def add_up(*numbers: int) -> list[int]:
    """The sums of the numbers over all ranks. They keep ranks in step: if one stops or saves, all do."""
    sums = torch.tensor(numbers)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def agree(args: argparse.Namespace, **found) -> None:
    """UserError unless all ranks have the same settings and have `found` the same in files."""
    may_differ = ('_list', '_root', '_labels', '_dir', 'workers')  # each node may have its own paths
    settings = {key: value for key, value in vars(args).items() if not key.endswith(may_differ)}
    own = settings | found
    if gather(own) != [own] * world_size():
        raise UserError('the processes differ in settings, lists or checkpoints; all nodes must share these')


def average(tensors: list[torch.Tensor]) -> None:
    """Replace tensors of one dtype and device by their means over all ranks, in one message."""
    if dist.is_initialized() and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        means = (flat / world_size()).split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means):
            tensor.copy_(mean.view_as(tensor))


# Stopping together ----------------------------------------------------------------------------------------


@contextmanager
def together() -> Iterator[None]:
    """Turn one rank's OSError or ValueError into a UserError of all. No collective may be inside: the other
    ranks wait at the end of the block for the one that is in trouble."""
    trouble = ''
    try:
        yield
    except (OSError, ValueError) as error:
        trouble = about_file(error)
    stop_together(trouble)


def stop_together(trouble: str) -> None:
    """Raise UserError on all ranks if one of them has a text about its trouble."""
    for text in gather(trouble):
        if text:
            raise UserError(text)


def one_line_about(error: Exception) -> str:
    """What ends the run, in a line: a mistake, the system, or another process that has died; '' for a bug."""
    reason = str(error).partition('\n')[0]
    # A worker that dies breaks off its connection, or DataLoader notices; torch has no type for that.
    if isinstance(error, (ConnectionError, EOFError)) or reason.startswith(('DataLoader', 'Pin memory')):
        hint = 'too little memory, or a file that crashes the decoder (`prepare.py check` finds it)'
        return f'a loader worker has died or hangs, {hint}: {reason}'
    if isinstance(error, dist.DistError) or '/gloo/' in reason:
        return f'a process of the run has died or hangs: {reason}'
    return about_file(error) if isinstance(error, (UserError, OSError)) else ''


def about_file(error: Exception) -> str:
    """'FILE: what is wrong' of the system's errors that name a file, else the error's own text."""
    if getattr(error, 'filename', None):
        return f'{error.filename}: {error.strerror}'
    return str(error) or type(error).__name__


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make an OSError name the file that is being written, and how much is free there."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(path.parent).free >> 20
        raise OSError(f'{path} cannot be written ({error.strerror}, {free} MB are free there)') from None


def say(text: str = '', file: TextIO | None = None, everywhere: bool = False) -> None:
    """Print a line above progress bars, on the main process or everywhere. A closed pipe ends nothing."""
    if rank() and not everywhere:
        return
    if file is None:
        file = sys.stdout
    try:
        tqdm.write(text, file=file)
        file.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


# Loader workers -------------------------------------------------------------------------------------------


def loader(dataset: Dataset, workers: int, batch_bytes: int, held: int = 1, **options) -> DataLoader:
    """A DataLoader whose workers leave stop signals to the main process and end with it. The main process
    uses `held` batches at a time."""
    with together():  # all processes of a machine measure before one of them fills it
        check_shared_memory(batch_bytes, workers, held)
    if workers:
        # A worker that is forked while a thread of gloo lets go of what it has sent never starts in Python
        # before 3.10.15 and 3.11.10 (cpython issue 112275).
        time.sleep(0.1)
        options |= {'worker_init_fn': begin_worker, 'multiprocessing_context': CONTEXT}
        options['timeout'] = PATIENCE.total_seconds()
    return DataLoader(dataset, num_workers=workers, pin_memory=torch.cuda.is_available(), **options)


def begin_worker(worker_id: int) -> None:
    end_with_parent()
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    for signum in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE):  # torch would print a line for these
        signal.signal(signum, signal.SIG_DFL)


def end_with_parent() -> None:
    """End this process once the one that started it has ended, even if that was while this one started."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def check_shared_memory(batch_bytes: int, workers: int, held: int) -> None:
    """Raise UserError if /dev/shm is too small for the batches of all processes of this machine: two of each
    worker, those that the main process uses, and the next ones that were handed over to it."""
    if workers and os.path.exists('/dev/shm'):  # macOS has none
        processes = int(os.environ.get('LOCAL_WORLD_SIZE', '1'))
        needed = processes * batch_bytes * (2 * workers + 2 * held)
        free = shutil.disk_usage('/dev/shm').free
        if free < needed:
            raise UserError(
                f'/dev/shm has {free >> 20} MB free, the batches of {processes} x {workers} loader workers '
                f'take {needed >> 20} MB: lower --workers, or give a container more of it: docker run '
                f'--shm-size={max(8, math.ceil(needed / 2**30))}g'
            )


def default_workers() -> int:
    """Loader processes for this process: its share of the cores, at most 16 (the reference starts 12)."""
    return max(1, min(16, cores() // int(os.environ.get('LOCAL_WORLD_SIZE', '1'))))


def cores() -> int:
    """CPU cores that the scheduler and, in a container, its quota grant this process."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    with suppress(OSError, ValueError), open('/sys/fs/cgroup/cpu.max') as file:  # not everywhere, or 'max'
        quota, period = map(int, file.read().split())
        count = min(count, -(-quota // period))
    return count


def peak_memory() -> int:
    """The most memory that this process has held, in MB."""
    unit = 2**20 if sys.platform == 'darwin' else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def locked(file: TextIO) -> bool:
    """Lock an open file until this process ends, however it ends; False if another process has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, (BlockingIOError, PermissionError))  # others: the disk has no locks
    return True
