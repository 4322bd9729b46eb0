"""Process many files on all cores, although any file can kill the process that reads it."""

import errno
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from itertools import chain
from multiprocessing.connection import Connection, wait

import torch
from tqdm import tqdm

from data import one_line
from runtime.distributed import CONTEXT, cores, end_with_parent


def in_parallel(function: Callable, jobs: list[tuple], title: str) -> Iterator[tuple[tuple, str]]:
    """Do the jobs on all cores, with a progress bar, and yield (job, reason) for each, in order.

    `reason` is '' or one line: what function(*job) raised, or that it killed its process. A process has one
    job at a time, so the culprit is known and no other job is lost. Raises OSError on a full disk.
    """
    first, reasons, left, idle, busy = 0, {}, iter(range(len(jobs))), [], {}
    count = min(cores(), 256)  # each process takes three file handles, usually of 1024
    with tqdm(total=len(jobs), desc=title, unit='file', disable=None) as bar:
        try:
            while first < len(jobs):
                while len(busy) < count and (number := next(left, None)) is not None:
                    connection = idle.pop() if idle else start(function)
                    try:
                        connection.send(jobs[number])
                        busy[connection] = number
                    except ConnectionError:  # its process has died meanwhile
                        left = chain([number], left)
                for connection in wait(busy):
                    number = busy.pop(connection)
                    try:
                        reasons[number], is_full = connection.recv()
                        idle.append(connection)
                        if is_full:
                            raise OSError(f'{reasons[number]}; the files that are finished stay')
                    except EOFError:
                        reasons[number] = 'its process died: a decoder crash, or out of memory'
                    except ConnectionResetError:  # it died before it had read the job
                        left = chain([number], left)
                    bar.update(number in reasons)
                while first in reasons:
                    yield jobs[first], reasons.pop(first)
                    first += 1
        finally:
            for process in multiprocessing.active_children():  # whether idle or in the middle of a file
                process.kill()
                process.join()


def start(function: Callable) -> Connection:
    """Start a process that does the jobs it is sent, and return the connection to it."""
    here, there = multiprocessing.Pipe()
    process, signals = CONTEXT.Process(target=work, args=(function, there), daemon=True), []
    before = signal.signal(signal.SIGINT, lambda *_: signals.append(_))  # Ctrl-C is for this process alone
    process.start()
    signal.signal(signal.SIGINT, before)
    for _ in signals:
        signal.raise_signal(signal.SIGINT)
    there.close()
    return here


def work(function: Callable, connection: Connection) -> None:
    """Answer each job with ('' or why it failed, whether the disk is full); end with the parent."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    while True:
        job, answer = connection.recv(), ('', False)
        try:
            function(*job)
        except Exception as error:  # damaged files make decoders raise anything
            full = getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
            answer = str(error) if full else one_line(error), full
        connection.send(answer)
