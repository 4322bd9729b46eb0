"""What machines do to a run: little shared memory, signals, closed terminals, a file that hangs or crashes, a
broken TensorBoard, another operating system. The run says it in a line, and nothing is lost."""

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run

OPTIONS = (
    '--demo --layers 1 1 1 1 --width 8 --size 28 --epochs 1 --videos-per-gpu 2 --images-per-gpu 2 '
    '--log-interval 1 --no-validate --work-dir'
)
LAUNCH = {
    1: [sys.executable],
    2: [sys.executable, *'-m torch.distributed.run --standalone --nproc_per_node=2'.split()],
}


@pytest.fixture(scope='module', autouse=True)
def no_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CUDA_VISIBLE_DEVICES', '')
        patch.setenv('OMP_NUM_THREADS', '1')
        yield


@pytest.fixture(scope='module')
def trained(demo):
    run(f'train.py {OPTIONS} trained', demo)
    return demo


def command(processes, folder, options=''):
    return [*LAUNCH[processes], str(ROOT / 'train.py'), *OPTIONS.split(), folder, *options.split()]


def start(demo, processes, folder, options='--workers 1'):
    """Start a run whose output goes to FOLDER.txt, in a process group of its own."""
    with open(demo / f'{folder}.txt', 'w') as out:
        line = command(processes, folder, options)
        return subprocess.Popen(line, cwd=demo, stdout=out, stderr=out, start_new_session=True)


def wait_for(condition):
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def steps(folder):
    """How many steps a run has logged."""
    return len((folder / 'log.jsonl').read_text().splitlines()) if (folder / 'log.jsonl').exists() else 0


def saved_step(folder):
    return torch.load(folder / 'latest.pth', weights_only=True)['step']


# What a machine refuses -----------------------------------------------------------------------------------

SHM = 'unshare -m sh -c \'mount -t tmpfs -o {} none /dev/shm && exec "$@"\' sh'
LONG = f'mkdir -p /tmp/{"x" * 76}; TMPDIR=/tmp/{"x" * 76}'


@pytest.mark.parametrize(
    ('limit', 'program', 'expected'),
    [
        (SHM.format('size=100k'), 'train.py', '--shm-size=8g'),
        (SHM.format('size=100k'), 'torchrun', '--shm-size=8g'),
        (SHM.format('size=1m'), 'evaluate.py', '--shm-size=8g'),
        (SHM.format('ro'), 'train.py', '--shm-size=8g'),
        (LONG, 'train.py', 'TMPDIR=/tmp'),
        (LONG, 'evaluate.py', 'TMPDIR=/tmp'),
        *[(f'ulimit -n {count};', 'train.py', 'ulimit -n') for count in (16, 20, 26)],
    ],
)
def test_what_keeps_workers_from_handing_over_is_said_in_a_line(trained, limit, program, expected):
    if 'unshare' in limit and subprocess.run('unshare -m mount -t tmpfs none /mnt'.split()).returncode:
        pytest.skip('needs root')
    line = command(1 + (program == 'torchrun'), f'refused{len(os.listdir(trained))}', '--workers 2')
    if program == 'evaluate.py':
        line = [sys.executable, str(ROOT / program), *'--ckpt trained/latest.pth --workers 2'.split()]
    line = ['sh', '-c', f'{limit} "$@"', 'sh', *line]
    result = subprocess.run(line, cwd=trained, capture_output=True, text=True, timeout=100)
    lines = [line for line in result.stderr.splitlines() if line.startswith(('train.py:', 'evaluate.py:'))]
    assert result.returncode == 1 and expected in lines[0] and 'dataloader.py' not in result.stderr
    assert len(lines) == len(result.stderr.splitlines()) or program == 'torchrun'


@pytest.mark.parametrize('fault', ['raise KeyError("a bug")', 'return lambda: 0'])
def test_a_bug_in_a_worker_shows_its_traceback(demo, fault):
    code = f'def collate(samples):\n    {fault}  # a bug\ntrain.data.collate = collate'
    (demo / 'bug.py').write_text(
        f'import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n{code}\ntrain.main()'
    )
    result = run(f'bug.py {OPTIONS} bug --workers 1', demo, expect=1)
    assert 'Traceback' in result.stderr and ('collate' in result.stderr or 'a bug' in result.stderr)


@pytest.mark.parametrize('name', ['SIGSEGV', 'SIGKILL'])
def test_a_file_that_crashes_its_worker(demo, name):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import data, train
data.crop_box = lambda *_: os.kill(os.getpid(), signal.{name})
train.main()
"""
    (demo / 'crash.py').write_text(code)
    lines = run(f'crash.py {OPTIONS} crash --workers 2', demo, expect=1).stderr.splitlines()
    assert len(lines) == 1 and '`prepare.py check`' in lines[0], lines


# Signals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('processes', 'workers', 'signum'),
    [(1, 0, signal.SIGTERM), (1, 1, signal.SIGHUP), (1, 1, signal.SIGINT), (2, 1, signal.SIGTERM)],
)
def test_a_stop_signal_ends_the_wait_for_a_disk_that_hangs(demo, processes, workers, signum):
    folder, images = f'hangs{processes}{workers}{signum}', demo / 'data/demo/images_train'
    names, hanging = sorted(path.name for path in images.iterdir())[:8], f'{folder}.jpg'
    os.mkfifo(images / hanging)  # which nobody writes to: opening it waits forever
    lines = [f'{name} {number % 4}' for number, name in enumerate([*names[:7], hanging])]
    (demo / f'{folder}.list').write_text('\n'.join(lines))
    options = f'--workers {workers} --image-list {folder}.list --resume'
    process, shown = start(demo, processes, folder, options), -1
    wait_for((demo / folder / 'bad_samples.txt').exists)
    while shown < steps(demo / folder):
        shown = steps(demo / folder)
        time.sleep(3)
    os.killpg(process.pid, signum)
    assert process.wait(timeout=60) == (128 + signum if processes == 1 else 1)
    output = (demo / f'{folder}.txt').read_text()
    assert f'stopped by {signum.name} and saved' in output and 'dataloader.py' not in output
    assert saved_step(demo / folder) == shown and not (demo / folder / 'bad_samples.txt').read_text()
    os.replace(images / names[7], images / hanging)
    run(command(processes, folder, options)[1:], demo)
    os.replace(images / hanging, images / names[7])


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize('processes', [1, 2])
def test_a_signal_to_all_processes_at_once_saves(demo, processes, signum):
    folder = f'all{processes}{signum}'
    process = start(demo, processes, folder, '--workers 1 --epochs 99')
    wait_for(lambda: steps(demo / folder) > 3)
    os.killpg(process.pid, signum)  # torchrun sends it to its ranks once more
    process.wait(timeout=60)
    assert f'stopped by {signum.name} and saved' in (demo / f'{folder}.txt').read_text()
    assert saved_step(demo / folder) == steps(demo / folder)


def test_a_run_whose_terminal_is_closed_saves(demo):
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(demo)
        os.execv(sys.executable, command(1, 'closed', '--epochs 99 --workers 1'))
    wait_for(lambda: os.read(terminal, 10000) and steps(demo / 'closed') > 3)
    os.close(terminal)  # a write fails now, and it gets SIGHUP
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert saved_step(demo / 'closed') == steps(demo / 'closed')


def test_a_terminal_that_is_lost_without_a_signal_ends_nothing(demo):
    """As with nohup, or in a tmux that was killed."""
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(demo)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        code = f'import sys; sys.path.insert(0, {str(ROOT)!r}); import runtime.guard as guard, train; '
        code += 'guard.STOP_SIGNALS.clear(); train.main()'
        os.execv(sys.executable, [sys.executable, '-c', code, *command(1, 'lost')[2:]])
    wait_for(lambda: os.read(terminal, 10000) and steps(demo / 'lost') > 3)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and saved_step(demo / 'lost') == 16


# What stands about on a machine ---------------------------------------------------------------------------

BOARD = """
class SummaryWriter:
    def __init__(self, *args, **kwargs):
        self.left = {left}
    def add_scalar(self, *args):
        self.left -= 1
        if self.left < 0:
            raise {error}
    def close(self):
        self.add_scalar()
"""


@pytest.mark.parametrize(
    ('code', 'line'),
    [
        (
            'raise TypeError("Descriptors cannot be created directly.\\nIf this call")',
            'Descriptors cannot be created',
        ),
        ('import nowhere', "No module named 'nowhere'"),
        ('raise AttributeError("no attribute bool8")', 'no attribute bool8'),
        (BOARD.format(left=20, error='OSError(28, "No space left on device")'), 'No space left on device'),
        (
            BOARD.format(left=16 * 14, error='OSError(28, "No space left on device")'),
            'No space left on device',
        ),
        ('raise ModuleNotFoundError(name="tensorboard")', None),
    ],
)
def test_a_tensorboard_that_fails_turns_itself_off(demo, tmp_path, code, line):
    (tmp_path / 'sitecustomize.py').write_text(
        f'import sys, types\nmodule = types.ModuleType("torch.utils.tensorboard")\n'
        'class Finder:\n    def find_spec(self, name, path, target=None):\n'
        '        if name == "torch.utils.tensorboard":\n            import importlib.util as u\n'
        f'            return u.spec_from_file_location(name, {str(tmp_path / "board.py")!r})\n'
        'sys.meta_path.insert(0, Finder())'
    )
    (tmp_path / 'board.py').write_text(code)
    result = run(f'train.py {OPTIONS} {tmp_path / "run"} --workers 0', demo, PYTHONPATH=str(tmp_path))
    shown = re.findall('no more TensorBoard events: (.*)', result.stdout)
    assert shown == [] if line is None else len(shown) == 1 and shown[0].startswith(line)
    assert not result.stderr and steps(tmp_path / 'run') == 16


@pytest.mark.parametrize(
    'env',
    [
        {'RANK': '0'},
        {'WORLD_SIZE': '2'},
        {'LOCAL_RANK': '1'},
        {'RANK': '0', 'WORLD_SIZE': ''},
        {'RANK': '0', 'WORLD_SIZE': '1'},
        {'RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': 'x'},
    ],
)
def test_variables_of_torchrun_that_are_left_over(demo, env):
    for program in ('train.py --demo', 'evaluate.py --ckpt none.pth'):
        lines = run(program, demo, expect=1, **env).stderr.splitlines()
        assert (
            len(lines) == 1
            and f'unset {" ".join(sorted(env.keys() - {"MASTER_ADDR", "MASTER_PORT"}))}' in lines[0]
        )


# Other systems --------------------------------------------------------------------------------------------

WINDOWS = """
import multiprocessing, multiprocessing.context, os, signal, sys
sys.modules['fcntl'] = sys.modules['resource'] = None
for name in ('SIGHUP', 'SIGPIPE', 'SIGCHLD', 'pthread_sigmask'):
    delattr(signal, name)
del os.fork, os.sched_getaffinity
multiprocessing.get_all_start_methods = lambda: ['spawn']
multiprocessing.set_start_method('spawn')
for name in ('fork', 'forkserver'):
    del multiprocessing.context._concrete_contexts[name]
opened = os.open
def os_open(path, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, 'Permission denied', path)
    return opened(path, *args, **kwargs)
os.open = os_open
class Finder:
    def find_spec(self, name, path, target=None):
        if name == 'torch.utils.data.dataloader':  # asks sys.platform
            import torch.utils.data._utils.signal_handling as handling
            handling.IS_WINDOWS = True
sys.meta_path.insert(0, Finder())
"""


def test_without_what_windows_and_macos_lack(demo, tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(WINDOWS)
    env = {'PYTHONPATH': str(tmp_path)}
    options = '--layers 1 1 1 1 --width 8 --size 28 --epochs 1 --workers 2'
    result = run(f'train.py --demo {options}', tmp_path, **env)
    assert not result.stderr and 'nan' not in result.stdout
    result = run('evaluate.py --ckpt work_dirs/demo/latest.pth --workers 1 --clips 2', tmp_path, **env)
    assert not result.stderr
    run('prepare.py check data/demo/videos_val', tmp_path, **env)
    run('flops.py --help', tmp_path, **env)
