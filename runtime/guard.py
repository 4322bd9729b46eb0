"""What all processes of a run decide together once a step: save now? stop? too many unreadable files?"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from data import Batch
from runtime.distributed import STOP_SIGNALS, UserError, add_up, gather, rank, say, stop_together, writing


class Guard:
    """Listens to stop signals from its creation until `close`, and lists each unreadable file once in the
    folder's bad_samples.txt."""

    def __init__(self, folder: Path, save_minutes: float, max_bad: float):
        self.folder, self.save_minutes, self.max_bad = folder, save_minutes, max_bad
        self.epoch, self.unreadable, self.drawn = -1, 0, 0  # samples of this epoch, on all ranks
        self.bad_list = open(folder / 'bad_samples.txt', 'a+', 1, 'utf-8', 'surrogateescape')
        self.bad_list.seek(0)
        self.listed = {line.rstrip('\n') for line in self.bad_list}
        self.received, self.since, self.last_save = 0, 0.0, time.monotonic()
        self.launcher = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else None
        # A hangup that `nohup` has shielded the run from stays ignored.
        self.signals = [signum for signum in STOP_SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
        for signum in self.signals:
            signal.signal(signum, self._note)

    def _note(self, signum: int, frame) -> None:
        """Remember a signal for the step boundary. A scheduler and a launcher may both send one at once; one
        that comes five seconds later ends the process immediately, even if it waits for a disk that hangs."""
        if self.received and time.monotonic() - self.since > 5:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        if not self.received:
            self.received, self.since = signum, time.monotonic()
            if rank() == 0:  # not by print, which may be what was interrupted
                name = signal.Signals(signum).name
                line = f'\n{name}: saving before the next step; another after 5 seconds ends it now\n'
                with suppress(OSError):
                    os.write(2, line.encode())

    def ask(self, batches: list[dict[str, Batch]], epoch: int) -> tuple[bool, int]:
        """Before a step on these batches: (save now, the signal that stops it or 0), the same on all ranks.

        Raises UserError on all ranks if one finds no readable sample, or all together too few.
        """
        parts = [part for batch in batches for part in batch.values()]
        bad = [line for part in parts for line in part.bad]
        hopeless = [part.bad[-1] for part in parts if part.pixels is None]
        drawn = sum(len(part.paths) for part in parts) + len(bad)  # with those that others have replaced
        is_due = rank() == 0 and time.monotonic() - self.last_save > 60 * self.save_minutes
        if self.launcher is not None and self.launcher != os.getppid() and not self.received:
            self.received = signal.SIGTERM  # a killed torchrun has left this process behind
        # The one question of a step. What follows depends on the sums alone, so all ranks do the same.
        counts = len(hopeless), is_due, len(bad), drawn, self.received > 0
        in_trouble, due, unreadable, drawn, stopped = add_up(*counts)
        if in_trouble:
            stop_together(f'11 samples in a row are unreadable, the last {hopeless[0]}' if hopeless else '')

        for line in bad:
            line = line.replace('\n', r'\n').replace('\r', r'\r')  # a line each, whatever a file's name
            if line not in self.listed:
                self.listed.add(line)
                with writing(self.folder / 'bad_samples.txt'):
                    print(line, file=self.bad_list)
        if epoch != self.epoch:
            self.epoch, self.unreadable, self.drawn = epoch, 0, 0
        self.unreadable, self.drawn = self.unreadable + unreadable, self.drawn + drawn
        if self.unreadable > max(self.max_bad * self.drawn, 20):
            raise UserError(
                f'{self.unreadable} of the {self.drawn} samples drawn in this epoch are unreadable, more '
                f'than --max-bad {self.max_bad:g} allows; see {self.folder}/bad_samples.txt'
            )
        if due:
            self.last_save = time.monotonic()
        return bool(due), max(gather(self.received)) if stopped else 0

    def leave(self, signum: int) -> None:
        """End the run, which a signal has stopped and which has been saved."""
        say(f'stopped by {signal.Signals(signum).name} and saved; --resume goes on from here')
        sys.exit(128 + signum)

    def close(self) -> None:
        """Stop listening: there is nothing left to save."""
        for signum in self.signals:
            signal.signal(signum, signal.SIG_DFL)
