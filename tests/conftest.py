"""Small real files for the tests, made on the spot, and the commands run as a user would."""

import atexit
import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
DOCS = '\n'.join(path.read_text() for path in [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))])
SMALL = '--demo --video-list few.txt --width 8 --size 28 --clip-len 4 --frame-interval 2'  # a quick run
SCRIPTS = ('train.py', 'evaluate.py', 'flops.py', 'prepare.py')
sys.path.insert(0, str(ROOT))


def write_video(path, num_frames=40, codec='libx264', size=(48, 64), options=(), pix_fmt='yuv420p', times=()):
    """A video of moving noise in which no two frames are alike; `times` are presentation times in 1/600 s."""
    rng = np.random.default_rng(num_frames)
    texture = rng.integers(0, 256, (size[0], size[1] + num_frames, 3), dtype=np.uint8)
    texture = texture // 4 + np.linspace(0, 190, texture.shape[1]).astype(np.uint8)[None, :, None]
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=30, options=dict(options))
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        if len(times):
            stream.time_base = stream.codec_context.time_base = Fraction(1, 600)
        for i in range(num_frames):
            picture = np.ascontiguousarray(texture[:, i : i + size[1]])
            frame = av.VideoFrame.from_ndarray(picture, format='rgb24')
            if len(times):
                frame.pts, frame.time_base = times[i], Fraction(1, 600)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if codec == 'libsvtav1' and hasattr(os, 'SCHED_OTHER'):  # SVT-AV1 takes real-time priority if it can
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return str(path)


def decode_all(path):
    """Every frame of a video, decoded from the start, RGB (N, H, W, 3)."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1  # each number patches errors differently
        return np.stack([frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)])


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def checkpoint_in(folder, name='latest'):
    """What a run has saved there."""
    return torch.load(folder / f'{name}.pth', weights_only=True)


def same(ours, theirs):
    """Whether two state_dicts are alike bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def records(folder, key=''):
    """What a run has logged: all its records, or those with this key."""
    lines = map(json.loads, (folder / 'log.jsonl').read_text().splitlines())
    return [record for record in lines if not key or key in record]


def processes_of(work_dir):
    """The ranks that torchrun has started for this folder, and their workers."""
    found = []
    for process in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            arguments = os.fsdecode((process / 'cmdline').read_bytes()).split('\0')
            if work_dir.name in arguments and os.readlink(process / 'cwd') == str(work_dir.parent):
                found.append(int(process.name))
    return found


# Imports what commands import, which takes 3 seconds, and forks for each command that it is told of. The fork
# runs the script as Python would, to the interpreter's end.
SERVER = f"""
import gc, json, os, pathlib, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch._dynamo, torchvision, evaluate, flops, prepare, train
for name in [*sys.modules]:
    if name.split('.')[0] in {['runtime', *(path.stem for path in ROOT.glob('*.py'))]!r}:
        del sys.modules[name]  # a fork of the program has its own
gc.freeze()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
for line in sys.stdin:
    arguments, folder, env, *files, status = json.loads(line)
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        pathlib.Path(status + '.tmp').write_text(str(code))
        os.rename(status + '.tmp', status)
        os._exit(0)
    os.setsid()
    print(os.getpid(), flush=True)  # from now on a signal to its session reaches it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for descriptor, path in enumerate([os.devnull, *files]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
    if arguments[0] == '-c':
        exec(arguments.pop(1), {{'__name__': '__main__'}})
    else:
        runpy.run_path(arguments[0], run_name='__main__')
    break
"""


@functools.cache
def server():
    """The fork server of this pytest process, and a folder for its files."""
    line, env = [sys.executable, '-c', SERVER], {**os.environ, 'OMP_NUM_THREADS': '1'}
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
    process = subprocess.Popen(line, env=env, start_new_session=True, **pipes)
    return process, tempfile.TemporaryDirectory()


class Forked:
    """A command of the project in forks of the server, one for each rank, each in a session of its own. They
    write to the files `out` and `err`."""

    def __init__(self, command, cwd, ranks=1, **env):
        line = [*command] if isinstance(command, list) else command.split()
        line = [str(ROOT / part) if part in SCRIPTS else part for part in line]
        process, folder = server()
        own = Path(tempfile.mkdtemp(dir=folder.name))
        self.out, self.err, self.pids = own / 'out', own / 'err', []
        self.ends = [own / str(rank) for rank in range(ranks)]
        env = {**os.environ, 'OMP_NUM_THREADS': '1', **env}  # so that tests beside each other keep their pace
        if line[0] == 'torchrun':
            port = [] if '--nnodes=2' in line else ['--standalone']  # which takes one of its own
            line[:1] = [f'{os.path.dirname(sys.executable)}/torchrun', *port]
            env = {'CUDA_VISIBLE_DEVICES': '', **env}  # a machine may have fewer GPUs than processes here
        if ranks > 1:  # what torchrun sets
            with socket.socket() as free:
                free.bind(('127.0.0.1', 0))
                env |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free.getsockname()[1])}
            env |= {'WORLD_SIZE': str(ranks), 'LOCAL_WORLD_SIZE': str(ranks), 'CUDA_VISIBLE_DEVICES': ''}
        for rank, end in enumerate(self.ends):
            if ranks > 1:
                env |= {'RANK': str(rank), 'LOCAL_RANK': str(rank)}
            job = [line, cwd, env, self.out, self.err, end]
            print(json.dumps(job, default=str), file=process.stdin, flush=True)
            self.pids.append(int(process.stdout.readline()))
        atexit.register(lambda: self.poll() is None and self.kill())  # where a test has failed

    def poll(self):
        """The exit status, once all have ended: a signal that killed one, or the highest."""
        if all(end.exists() for end in self.ends):
            codes = sorted(int(end.read_text()) for end in self.ends)
            return codes[0] or codes[-1]

    def kill(self, signum=signal.SIGKILL):
        """Send a signal to all ranks and their workers, as a scheduler or a terminal does."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signum)

    def wait(self, timeout=400):
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(self.out.read_text()[-3000:] + self.err.read_text()[-3000:])
            time.sleep(0.01)
        return self.poll()


def run(command, cwd, expect=0, ranks=1, **env):
    """Run a command of the project, `train.py --epochs 1` say, and give back its result with stdout and
    stderr. Only what torchrun starts is a new Python."""
    forked = Forked(command, cwd, ranks, **env)
    status = forked.wait()
    # Without a network, torch has a line about that.
    said = re.sub('.* hostname of the client socket cannot .*\n', '', forked.err.read_text())
    result = subprocess.CompletedProcess(command, status, forked.out.read_text(), said)
    assert status == expect, result.stdout[-3000:] + result.stderr[-3000:]
    return result


@pytest.fixture
def fails(demo, monkeypatch, capsys):
    """A function that calls a program's main with bad input and gives back its one line."""

    def call(main, arguments, code=1):
        monkeypatch.chdir(demo)
        with pytest.raises(SystemExit) as exit:
            main(arguments.split())
        assert exit.value.code == code
        [line] = capsys.readouterr().err.strip().splitlines()
        return line

    return call


@pytest.fixture(scope='session')
def demo(tmp_path_factory):
    """A folder with a small set below data/demo, as `train.py --demo` would make it."""
    import prepare

    folder = tmp_path_factory.mktemp('demo run')
    prepare.make_demo(folder / 'data/demo', train_videos=4, val_videos=2, train_images=10, val_images=3)
    lines = (folder / 'data/demo/video_train.txt').read_text().splitlines(keepends=True)
    (folder / 'few.txt').write_text(''.join(lines[:16]))
    return folder
