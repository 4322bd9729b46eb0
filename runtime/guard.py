"""What all processes of a run decide together once a step: save now? stop? too many unreadable files?"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from data import Batch
from runtime.distributed import STOP_SIGNALS, UserError, add_up, rank, say, stop_together


class Stop(BaseException):
    """A signal ends the wait for a batch. Not an Exception, because those count as unreadable files."""


class Guard:
    """Listens to stop signals from its creation until `close`, and lists each unreadable file once in the
    folder's bad_samples.txt."""

    def __init__(self, folder: Path, save_minutes: float, max_bad: float):
        self.folder, self.save_minutes, self.max_bad = folder, save_minutes, max_bad
        self.epoch, self.unreadable, self.drawn = -1, 0, 0  # samples of this epoch, on all ranks
        bad_list = folder / 'bad_samples.txt'
        self.bad_list = open(bad_list, 'a+', 1, 'utf-8', 'surrogateescape')
        self.bad_list.seek(0)
        self.listed = set(self.bad_list)
        self.lost = set()  # (source, place in its list) of each file that this process could not read
        self.received, self.since, self.last_save, self.waiting = 0, 0.0, time.monotonic(), False
        self.launcher = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else None
        # A hangup that `nohup` has shielded the run from stays ignored.
        ignored = [s for s in STOP_SIGNALS if signal.getsignal(s) == signal.SIG_IGN and s != signal.SIGINT]
        self.signals = [signum for signum in STOP_SIGNALS if signum not in ignored]
        for signum in self.signals:
            signal.signal(signum, self._note)

    def _note(self, signum: int, frame) -> None:
        """Remember a signal for the step boundary. A scheduler and a launcher may both send one at once; a
        later one ends the process immediately."""
        if self.received and time.monotonic() - self.since > 5:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        if not self.received:
            self.received, self.since = signum, time.monotonic()
            if rank() == 0:  # not by print, which may be what was interrupted
                name = signal.Signals(signum).name
                line = f'\n{name}: saving after this step; another after 5 seconds ends it now\n'
                with suppress(OSError):
                    os.write(2, line.encode())
        if self.waiting:
            raise Stop

    def draw(self, batches: Iterator, count: int) -> list[dict[str, Batch]]:
        """The next batches; none once a signal has come. That ends the wait, say for a disk that hangs."""
        drawn = []
        with suppress(Stop):
            try:
                self.waiting = True
                if not self.received:
                    drawn = [next(batches) for _ in range(count)]
            finally:
                self.waiting = False
        return [] if self.received else drawn  # PyAV can take the interruption for a damaged file

    def ask(self, batches: list[dict[str, Batch]], epoch: int) -> tuple[bool, int]:
        """Before a step on these batches: (save now, the signal that stops it or 0), the same on all ranks.

        Raises UserError on all ranks if one finds no readable sample, or all together too few.
        """
        parts = [part for batch in batches for part in batch.values()]
        bad = [line for part in parts for line in part.bad]
        lost = [part.bad[-1] for part in parts if part.pixels is None]
        if self.launcher not in (None, os.getppid()):  # a killed torchrun has left this process behind
            self.received = self.received or signal.SIGTERM
        due = rank() == 0 and time.monotonic() - self.last_save > 60 * self.save_minutes
        asked = [self.received == signum for signum in STOP_SIGNALS]
        in_trouble, due, unreadable, drawn, *asked = add_up(
            bool(lost), due, len(bad), sum(len(part.paths) for part in parts), *asked
        )
        if in_trouble:
            stop_together(f'11 samples in a row are unreadable, the last one {lost[0]}' if lost else '')
        if epoch != self.epoch:
            self.epoch, self.unreadable, self.drawn = epoch, 0, 0
        self.unreadable, self.drawn = self.unreadable + unreadable, self.drawn + drawn
        for line in bad:
            if f'{line}\n' not in self.listed:
                self.listed.add(f'{line}\n')
                print(line, file=self.bad_list)
        self.lost |= {(source, i) for batch in batches for source, part in batch.items() for i in part.lost}
        if self.unreadable > max(self.max_bad * self.drawn, 20):
            raise UserError(
                f'{self.unreadable} of the {self.drawn} samples drawn in this epoch are unreadable, more '
                f'than --max-bad {self.max_bad:g} allows; mend or remove the files that '
                f'{self.folder}/bad_samples.txt lists, or raise it'
            )
        stop = next((signum for signum, count in zip(STOP_SIGNALS, asked) if count), 0)
        return bool(due), stop

    def saved(self) -> None:
        """A checkpoint has just been written."""
        self.last_save = time.monotonic()

    def leave(self, signum: int) -> None:
        """End the run, which a signal has stopped and which has been saved."""
        say(f'stopped by {signal.Signals(signum).name} and saved; --resume goes on from here')
        sys.exit(128 + signum)

    def close(self) -> None:
        """Stop listening: there is nothing left to save."""
        for signum in self.signals:
            signal.signal(signum, signal.SIG_DFL)
