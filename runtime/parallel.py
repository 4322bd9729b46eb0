"""Many files on all cores, where any of them can kill the process that reads it."""

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor

import torch
from tqdm import tqdm

from data import one_line

AT_ONCE = 100_000  # jobs handed in: each costs 3 KB, and all wait for the last


def in_parallel(function: Callable, jobs: list[tuple], title: str) -> Iterator[tuple[tuple, str]]:
    """Yield (job, reason) for each job, in order, done on all cores, with a progress bar.

    `reason` is '' or, in a line, what function(*job) raised. A job that kills its process breaks the pool; it
    is among the first that are left then, which are tried again alone. Raises OSError on a full disk.
    """
    cores = os.cpu_count() or 1
    with tqdm(total=len(jobs), desc=title, unit='file', disable=None) as bar:
        while jobs:
            left = []
            now, jobs = jobs[:AT_ONCE], jobs[AT_ONCE:]
            for job, result in results(function, now, cores):
                if result is None:
                    left.append(job)
                    continue
                bar.update()
                yield job, result
            for job in left[:cores]:
                [(_, result)] = results(function, [job], 1)
                died = 'its process died: a crash of the decoder, or no memory'
                bar.update()
                yield job, died if result is None else result
            jobs = left[cores:] + jobs


def results(function: Callable, jobs: list[tuple], processes: int) -> Iterator[tuple[tuple, str | None]]:
    """(job, what `attempt` gave) for each job; None for those that were not done when a process died."""
    context = multiprocessing.get_context('spawn')
    # Nothing begins before all is handed in: a job handed in while a process dies can be lost for good.
    all_in = context.Event()
    pool = ProcessPoolExecutor(processes, context, begin, (all_in,))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for this process alone
    futures = [(job, pool.submit(attempt, function, job)) for job in jobs]
    all_in.set()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        for job, future in futures:
            lost = isinstance(future.exception(), BrokenExecutor)
            yield job, None if lost else future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():  # at once, whether idle or in the middle of a file
            process.kill()


def begin(all_in) -> None:
    """Wait for the jobs, and end when the process that started this one does, however that ends."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    all_in.wait()


def attempt(function: Callable, job: tuple) -> str:
    """Do a job; gives '' or why it failed, in a line. Only a full disk, which ends all, is raised."""
    torch.set_num_threads(1)
    try:
        function(*job)
    except Exception as error:  # damaged files make decoders raise anything
        if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise OSError(f'{error}; the files that are finished stay') from None
        return one_line(error)
    return ''
