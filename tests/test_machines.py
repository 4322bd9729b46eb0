"""What machines do to a run: little shared memory, signals, closed terminals, a file that hangs or crashes, a
broken TensorBoard, another operating system. The run says it in a line, and nothing is lost."""

import os
import pty
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT, SMALL, Forked, processes_of, run, wait_for

import data

OPTIONS = f'{SMALL} --epochs 1 --videos-per-gpu 2 --images-per-gpu 2 --log-interval 1 --no-validate'


@pytest.fixture(scope='module', autouse=True)
def no_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CUDA_VISIBLE_DEVICES', '')
        yield


@pytest.fixture(scope='module')
def trained(demo):
    run(f'train.py {OPTIONS} --work-dir trained', demo)
    return demo


def after(code, line):
    """The command that runs a program's main after some code, as on a machine with that peculiarity."""
    program, *arguments = line.split()
    modules = 'import os, signal, sys, warnings, train, evaluate'
    quiet = 'warnings.simplefilter("ignore")'  # as of more workers than cores
    return ['-c', f'{modules}\n{quiet}\n{code}\n{program}.main()', *arguments]


def steps(folder):
    """How many steps a run has logged."""
    return len((folder / 'log.jsonl').read_text().splitlines()) if (folder / 'log.jsonl').exists() else 0


def saved_step(folder):
    return torch.load(folder / 'latest.pth', weights_only=True)['step']


# What a machine refuses -----------------------------------------------------------------------------------

SHM = """
import ctypes, subprocess
assert not ctypes.CDLL(None).unshare(0x20000)  # of mounts
subprocess.run('mount --make-rprivate /; mount -t tmpfs -o {} none /dev/shm', shell=True, check=True)
"""
LONG = f"""
import tempfile
tempfile.tempdir = '/tmp/{'x' * 76}'
os.makedirs(tempfile.tempdir, exist_ok=True)
"""
FILES = 'import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({0}, {0}))'


@pytest.mark.parametrize(
    ('limit', 'program', 'ranks', 'expected'),
    [
        (SHM.format('size=100k'), 'train', 1, '--shm-size=8g'),
        (SHM.format('size=100k'), 'train', 2, '--shm-size=8g'),
        (SHM.format('size=1m'), 'evaluate', 1, '--shm-size=8g'),
        (SHM.format('ro'), 'train', 1, '--shm-size=8g'),
        (LONG, 'train', 1, 'TMPDIR=/tmp'),
        (LONG, 'evaluate', 1, 'TMPDIR=/tmp'),
        *[(FILES.format(count), 'train', 1, 'ulimit -n') for count in (16, 20, 26)],
    ],
)
def test_what_keeps_workers_from_handing_over_is_said_in_a_line(trained, limit, program, ranks, expected):
    if 'unshare' in limit and subprocess.run('unshare -m mount -t tmpfs none /mnt'.split()).returncode:
        pytest.skip('needs root')
    line = f'train {OPTIONS} --work-dir refused{len(os.listdir(trained))} --workers 2'
    line = line if program == 'train' else 'evaluate --ckpt trained/latest.pth --workers 2'
    lines = run(after(limit, line), trained, expect=1, ranks=ranks).stderr.splitlines()
    assert expected in lines[0] and all(line.startswith(f'{program}.py: ') for line in lines), lines
    assert len(lines) <= ranks


@pytest.mark.parametrize('fault', ['raise KeyError("a bug")', 'return lambda: 0'])
def test_a_bug_in_a_worker_shows_its_traceback(demo, fault):
    code = f'def collate(samples):\n    {fault}  # a bug\ntrain.data.collate = collate'
    result = run(after(code, f'train {OPTIONS} --work-dir bug --workers 1'), demo, expect=1)
    assert 'Traceback' in result.stderr and ('collate' in result.stderr or 'a bug' in result.stderr)


@pytest.mark.parametrize(('name', 'number'), [('SIGSEGV', 1), ('SIGKILL', 9)])
def test_a_file_that_crashes_its_worker(demo, name, number):
    code = f"""
calls, crop_box = [], train.data.crop_box
def crashing(*arguments):
    calls.append(arguments)
    return crop_box(*arguments) if len(calls) < {number} else os.kill(os.getpid(), signal.{name})
train.data.crop_box = crashing
"""
    result = run(after(code, f'train {OPTIONS} --work-dir crash --workers 2'), demo, expect=1)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith('train.py: a loader worker has died or hangs'), lines
    assert '`prepare.py check`' in lines[0] and 'DataLoader worker' in lines[0]


# Signals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('ranks', 'workers', 'signum'),
    [(1, 0, signal.SIGTERM), (1, 1, signal.SIGHUP), (1, 1, signal.SIGINT), (2, 1, signal.SIGTERM)],
)
def test_a_stop_signal_ends_the_wait_for_a_disk_that_hangs(demo, ranks, workers, signum):
    folder, images = f'hangs{ranks}{workers}{signum}', demo / 'data/demo/images_train'
    names = sorted(path.name for path in images.iterdir())[:8]
    keys = data.JointSampler({'video': 16, 'image': 8}, {'video': 2, 'image': 2}, ranks).batch(1, 0)
    hanging = next(index for source, _, index in keys if source == 'image')  # in the second step
    names[hanging] = f'{folder}.jpg'
    os.mkfifo(images / names[hanging])  # which nobody writes to: opening it waits forever
    lines = [f'{name} {number % 4}' for number, name in enumerate(names)]
    (demo / f'{folder}.list').write_text('\n'.join(lines))
    line = f'train.py {OPTIONS} --work-dir {folder} --workers {workers} --image-list {folder}.list --resume'
    forked = Forked(line, demo, ranks)
    wait_for(lambda: steps(demo / folder) == 1, 100)
    time.sleep(0.5)
    forked.kill(signum)
    assert forked.wait() == 128 + signum
    output = forked.out.read_text() + forked.err.read_text()
    assert f'stopped by {signum.name} and saved' in output and 'dataloader.py' not in output
    assert saved_step(demo / folder) == 1 and not (demo / folder / 'bad_samples.txt').read_text()
    (images / names[hanging]).unlink()
    shutil.copy(images / names[hanging - 1], images / names[hanging])
    run(line, demo, ranks=ranks)
    (images / names[hanging]).unlink()


def test_a_signal_to_a_launcher_and_its_ranks_saves(demo):
    folder = demo / 'launched'
    line = f'torchrun --nproc_per_node=2 train.py {OPTIONS} --work-dir launched --workers 1 --epochs 99'
    forked = Forked(line, demo)
    wait_for(lambda: steps(folder) > 3, 100)
    ranks_and_workers = processes_of(folder)
    assert len(ranks_and_workers) == 4
    for pid in ranks_and_workers:
        os.kill(pid, signal.SIGTERM)
    forked.kill(signal.SIGTERM)  # torchrun sends it to its ranks once more
    forked.wait()
    assert 'stopped by SIGTERM and saved' in forked.out.read_text()
    assert saved_step(folder) == steps(folder)


@pytest.fixture
def in_terminal(demo):
    """A function that starts a run in a terminal, and closes that once the run is under way."""

    def call(code, line):
        terminal, inside = pty.openpty()
        code += f'\nfor i in range(3): os.dup2(os.open({os.ttyname(inside)!r}, os.O_RDWR), i)'
        code += '\nsys.stdout, sys.stderr = open(1, "w"), open(2, "w")'
        forked, folder = Forked(after(code, line), demo), demo / line.split('--work-dir ')[1].split()[0]
        wait_for(lambda: forked.poll() is None and os.read(terminal, 10000) and steps(folder) > 3, 100)
        os.close(inside)
        os.close(terminal)
        return forked.wait(), saved_step(folder), steps(folder)

    return call


def test_a_run_whose_terminal_is_closed_saves(in_terminal):
    """A write fails then, and it gets SIGHUP."""
    status, saved, logged = in_terminal('', f'train {OPTIONS} --work-dir closed --epochs 99 --workers 1')
    assert status == 128 + signal.SIGHUP and saved == logged


def test_a_terminal_that_is_lost_without_a_signal_ends_nothing(in_terminal):
    """As with nohup, or in a tmux that was killed."""
    code = 'signal.signal(signal.SIGHUP, signal.SIG_IGN)\ntrain.distributed.STOP_SIGNALS.clear()'
    assert in_terminal(code, f'train {OPTIONS} --work-dir lost') == (0, 8, 8)


# What stands about on a machine ---------------------------------------------------------------------------

BOARD = """
class SummaryWriter:
    def __init__(self, *args, **kwargs):
        self.left = {left}
    def add_scalar(self, *args):
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")
    def close(self):
        self.add_scalar()
"""


@pytest.mark.parametrize(
    ('code', 'line'),
    [
        ('raise TypeError("Descriptors cannot be created.\\nIf this call")', 'Descriptors cannot be created'),
        ('import nowhere', "No module named 'nowhere'"),
        ('raise AttributeError("no attribute bool8")', 'no attribute bool8'),
        (BOARD.format(left=20), 'No space left on device'),
        (BOARD.format(left=8 * 14), 'No space left on device'),
        ('raise ModuleNotFoundError(name="tensorboard")', None),
    ],
)
def test_a_tensorboard_that_fails_turns_itself_off(demo, tmp_path, code, line):
    (tmp_path / 'board.py').write_text(code)
    finder = f"""
import importlib.util
class Finder:
    def find_spec(self, name, path, target=None):
        if name == 'torch.utils.tensorboard':
            return importlib.util.spec_from_file_location(name, {str(tmp_path / 'board.py')!r})
sys.meta_path.insert(0, Finder())
"""
    result = run(after(finder, f'train {OPTIONS} --work-dir {tmp_path}/run --workers 0'), demo)
    shown = re.findall('no more TensorBoard events: (.*)', result.stdout)
    assert shown == [] if line is None else len(shown) == 1 and shown[0].startswith(line)
    assert not result.stderr and steps(tmp_path / 'run') == 8


@pytest.mark.parametrize(
    ('env', 'names'),
    [
        ({'RANK': '0'}, 'RANK'),
        ({'WORLD_SIZE': '2'}, 'WORLD_SIZE'),
        ({'LOCAL_RANK': '1'}, 'LOCAL_RANK'),
        ({'RANK': '0', 'WORLD_SIZE': ''}, 'RANK WORLD_SIZE'),
        ({'RANK': '0', 'WORLD_SIZE': '1'}, 'RANK WORLD_SIZE'),
        ({'RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': 'x'}, 'RANK WORLD_SIZE'),
    ],
)
def test_variables_of_torchrun_that_are_left_over(demo, env, names):
    for program in ('train.py --demo', 'evaluate.py --ckpt none.pth'):
        (line,) = run(program, demo, expect=1, **env).stderr.splitlines()
        assert line.endswith(f'unset {names}')


# Other systems --------------------------------------------------------------------------------------------

WINDOWS = """
import multiprocessing.context, multiprocessing.resource_tracker, os, signal, sys
sys.modules['fcntl'] = sys.modules['resource'] = None
for name in ('SIGHUP', 'SIGPIPE', 'SIGCHLD', 'pthread_sigmask'):
    delattr(signal, name)
multiprocessing.resource_tracker._HAVE_SIGMASK = False
del os.fork, os.sched_getaffinity
multiprocessing.get_all_start_methods = lambda: ['spawn']
multiprocessing.set_start_method('spawn', force=True)
for name in ('fork', 'forkserver'):
    del multiprocessing.context._concrete_contexts[name]
opened = os.open
def os_open(path, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, 'Permission denied', path)
    return opened(path, *args, **kwargs)
os.open = os_open
"""


def test_without_what_windows_and_macos_lack(trained, tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(WINDOWS)  # for what is spawned
    code = f"""
import torch.utils.data
torch.utils.data._utils.signal_handling.IS_WINDOWS = True  # which asks sys.platform
{WINDOWS}
import evaluate, flops, prepare, train
train.main('{OPTIONS} --work-dir spawned --workers 1'.split())
evaluate.main('--ckpt spawned/latest.pth --workers 1 --clips 1 --crops 1'.split())
prepare.main('check data/demo/videos_val/dots_falling_000.mp4'.split())
"""
    result = run(['-c', code], trained, PYTHONPATH=f'{tmp_path}:{ROOT}')
    assert not result.stderr and 'nan' not in result.stdout and '16 videos' in result.stdout
