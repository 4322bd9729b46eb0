"""The processes of a run: device and precision, starting, agreeing, stopping together, loader workers.

Begin with `processes`, which every command's main opens. Without torchrun there is one process;
nothing is sent, and `gather` and `add_up` give back what they got.
"""

import errno
import gc
import math
import multiprocessing.queues
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:  # on Windows
    fcntl = resource = None

# Forked workers share the lists, spawned ones copy them; on macOS the system's libraries crash when forked.
CAN_FORK = 'fork' in multiprocessing.get_all_start_methods() and sys.platform != 'darwin'
CONTEXT = multiprocessing.get_context('fork' if CAN_FORK else 'spawn')
STOP_SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP') if hasattr(signal, name)]
TORCHRUN = {'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE'}  # variables of its processes

# How faults of the machine show up, and what helps.
FAULTS = {
    'open files|ancdata|exit code 24': 'too few files may be open at once: ulimit -n 4096',
    r'shared memory|unable to mmap|/synchronize\.py': 'shared memory, /dev/shm, is too small or read-only; a '
    'container takes its size from docker run --shm-size=8g',
    'AF_UNIX|temporary directory': 'loader workers need a folder with a short path in TMPDIR: TMPDIR=/tmp',
    r'/popen_\w+\.py': 'no more processes may be started: lower --workers',
    '^DataLoader|^Pin memory': 'a loader worker has died or hangs: too little memory, too few open files '
    '(ulimit -n), or a file that crashes the decoder (`prepare.py check` finds it); --resume goes on',
    'gloo|NCCL': 'a process of the run has died or hangs, perhaps for lack of memory; --resume goes on',
}


class UserError(ValueError):
    """The run cannot start or go on; the message says what is wrong, where, and what to do."""


# Starting and ending --------------------------------------------------------------------------------------


@contextmanager
def processes(program: str):
    """Join the other processes of torchrun; `with processes('train.py') as device` gives this one's device.

    Inside, a user's mistake (UserError, OSError) or a fault of the machine ends every process with one line
    and status 1. So does the death of a process or of a loader worker. A bug shows its traceback.
    """
    open_outputs()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # which ends the program without a traceback
    try:
        try:
            yield join(program)
        finally:
            end_workers()  # first, because the death of one would interrupt the output below
            signal.signal(signal.SIGINT, before)
    except SystemExit as stop:  # all ranks have agreed on it
        end_process(stop.code)
    except Exception as error:
        line = explain(error)
        if program != 'train.py':
            line = line.replace('; --resume goes on', '')
        if not line and not dist.is_initialized():
            raise
        sys.unraisablehook = lambda _: None  # a DataLoader that could not start complains when it ends
        line = f'{program}: {line}' if line else traceback.format_exc()
        say(line, sys.stderr, everywhere=not isinstance(error, UserError))
        end_process(1)
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
            gc.collect()  # DDP's cycles hold its threads, which abort an interpreter that they outlive


def explain(error: Exception) -> str:
    """The line about a user's mistake or a fault of the machine; '' for a bug."""
    text = str(isinstance(error, RuntimeError) and error.__cause__ or error).strip()
    if isinstance(error, (ConnectionError, EOFError)):  # a worker broke off while it handed over a batch
        text = f'DataLoader worker: {error}'
    if isinstance(error, (OSError, EOFError, RuntimeError)):
        raised = re.findall(r'^\w+Error: .*', text, re.MULTILINE)  # in a worker: the text is its traceback
        reason = (raised[-1:] or text.splitlines() or [''])[0].split('. ')[0]
        place = re.findall('File "(.*)"', ''.join(traceback.format_exception(error)))[-1]
        for sign, line in FAULTS.items():
            if re.search(sign, (reason if raised else text) + f' {place}' * isinstance(error, OSError)):
                return f'{line} ({reason})'
        text = about_file(error) or reason if isinstance(error, OSError) else ''
    return text if isinstance(error, (UserError, OSError)) else ''


def about_file(error: Exception) -> str:
    """'FILE: what is wrong' of the system's errors that name a file; '' for others."""
    name = getattr(error, 'filename', None)
    return f'{name}: {error.strerror}' if name and error.strerror else ''


def open_outputs() -> None:
    """Make both outputs accept any file name, UTF-8 or not, and swallow all if a shell has closed them."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w'))
        if hasattr(getattr(sys, name), 'reconfigure'):
            getattr(sys, name).reconfigure(encoding='utf-8', errors='surrogateescape')


def end_process(status: int) -> None:
    """End this process, at once if there are others: leaving the group properly would wait for ranks that may
    never come (NCCL aborts only when all do), and hold back what is printed."""
    if not dist.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def join(program: str) -> torch.device:
    """This process's own GPU if there is one, else the CPU; joins the other processes under torchrun."""
    on_gpu, local_rank = torch.cuda.is_available(), int(os.environ.get('LOCAL_RANK') or 0)
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
    if names := sorted(TORCHRUN & os.environ.keys()):
        try:
            store, rank, world_size = next(dist.rendezvous('env://'))
        except (ValueError, RuntimeError) as error:
            raise UserError(f'{error}; without torchrun: unset {" ".join(names)}') from None
        # gloo carries what lies on the CPU (flags, scores), so that nothing waits for a GPU
        backend = 'cpu:gloo,cuda:nccl' if on_gpu else 'gloo'
        if os.environ.get('GROUP_WORLD_SIZE') == '1':
            # torchrun keeps this store when it restarts the processes, which must not see the old ones' keys
            # (pytorch issue 135712). On several nodes the counts may differ; docs/runs.md says what helps.
            store = dist.PrefixStore(f'start {os.environ.get("TORCHELASTIC_RESTART_COUNT")}', store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return device


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


def agree(value, what: str) -> None:
    """UserError unless all ranks have the same value; `what` names it in a few words."""
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
    """Turn one rank's OSError or ValueError into a UserError of all. No collective may be inside: the other
    ranks wait at the end of the block for the one that is in trouble."""
    trouble = ''
    try:
        yield
    except (OSError, ValueError) as error:
        trouble = about_file(error) or str(error) or type(error).__name__
    stop_together(trouble)


def stop_together(trouble: str) -> None:
    """Raise UserError on all ranks if one of them is in trouble: if its text is not empty."""
    for text in filter(None, gather(trouble)):
        raise UserError(text)


def say(text: str = '', file=None, everywhere: bool = False) -> None:
    """Print a line above progress bars, on the main process or everywhere. A closed pipe (`| head`) or
    terminal ends nothing."""
    if rank() and not everywhere:
        return
    file = file or sys.stdout
    try:
        tqdm.write(text, file=file)
        file.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


# Loader workers -------------------------------------------------------------------------------------------


def loader(dataset: Dataset, workers: int, **options) -> DataLoader:
    """A DataLoader whose workers leave stop signals to the main process, and tell it why a batch fails."""
    if workers:
        if dist.is_initialized():
            # A thread of gloo may still let go of what it sent last. In Python before 3.10.15 and 3.11.10, a
            # worker forked at that moment never starts (cpython issue 112275).
            time.sleep(0.1)
        # Half an hour is as long as ranks wait for one another. Without SIGCHLD, only a wait without a
        # timeout notices a dead worker.
        options |= {'timeout': 1800} if hasattr(signal, 'SIGCHLD') else {}
        options |= {'worker_init_fn': begin_worker, 'multiprocessing_context': CONTEXT}
    return DataLoader(dataset, num_workers=workers, pin_memory=torch.cuda.is_available(), **options)


def default_workers() -> int:
    """Loader processes for this process: its share of the cores, at most 16 (the reference starts 12)."""
    return max(1, min(16, cores() // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


def begin_worker(worker_id: int) -> None:
    """Leave stop signals to the main process, end with it, and tell it about errors in a worker's threads,
    which would only print them."""
    end_with_parent()
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    for name in {'SIGSEGV', 'SIGBUS', 'SIGFPE'} & {*dir(signal)}:  # torch would print a line for these
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    multiprocessing.queues.Queue._on_queue_feeder_error = send_reason
    sys.excepthook = end_worker


def end_with_parent() -> None:
    """End this process once the one that started it has ended, in whatever way. DataLoader's own watch does
    not see a main process that has died while the worker started."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def send_reason(queue: multiprocessing.queues.Queue, error: Exception, item: tuple) -> None:
    """Send the main process the reason why a batch cannot be sent."""
    queue.put((item[0], ExceptionWrapper(where='in a DataLoader worker')))


def end_worker(kind: type, error: BaseException, trace) -> None:
    """Exit with an errno, unless it was the main process that broke off."""
    if not isinstance(error, (ConnectionError, EOFError)):
        os._exit(getattr(error, 'errno', 1))


def end_workers() -> None:
    """Kill the loader workers that are left. They ignore SIGTERM, so a program that ends would wait for them
    forever."""
    if hasattr(signal, 'SIGCHLD'):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader would report their death as an error
    for worker in multiprocessing.active_children():
        worker.kill()


# What a machine grants, or lacks --------------------------------------------------------------------------


def cores() -> int:
    """CPU cores that the scheduler and, in a container, its quota grant this process."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    with suppress(OSError, ValueError), open('/sys/fs/cgroup/cpu.max') as file:  # not everywhere, or 'max'
        quota, period = map(int, file.read().split())
        count = min(count, -(-quota // period))
    return count


def peak_memory() -> float:
    """The most memory that this process has held, in MB; NaN if that is unknown."""
    if not resource:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == 'darwin' else 10)


def locked(file: TextIO) -> bool:
    """Lock an open file until this process ends, however it ends; False if another process has it."""
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # others mean a file system without locks
    return True


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time inside with the same folder; without locks, all of them."""
    descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        with suppress(OSError, AttributeError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if fcntl:
            os.close(descriptor)
