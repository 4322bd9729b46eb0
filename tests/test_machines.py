"""What machines do to a run: little shared memory, others that do not come, signals, closed terminals, files
that crash or hang, no compiler, a full disk. The run says it in a line, and nothing is lost."""

import os
import pty
import signal
import socket
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, Forked, checkpoint_in, processes_of, run, wait_for

import data
from runtime import distributed
from runtime.guard import Guard

OPTIONS = f'{SMALL} --epochs 1 --videos-per-gpu 2 --images-per-gpu 2 --log-interval 1 --no-validate'


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')


def after(code, line):
    """The command that runs a program's main after some code, as on a machine with that peculiarity."""
    program, *arguments = line.split()
    modules = 'import os, signal, sys, warnings, train, evaluate'
    quiet = 'warnings.simplefilter("ignore")'  # as of more workers than cores
    return ['-c', f'{modules}\n{quiet}\n{code}\n{program}.main()', *arguments]


def steps(folder):
    """How many steps a run has logged."""
    return len((folder / 'log.jsonl').read_text().splitlines()) if (folder / 'log.jsonl').exists() else 0


# What a machine lacks -------------------------------------------------------------------------------------

SHM = """
import ctypes, subprocess
assert not ctypes.CDLL(None).unshare(0x20000)  # of mounts
subprocess.run('mount --make-rprivate /; mount -t tmpfs -o size=100k none /dev/shm', shell=True, check=True)
"""


@pytest.mark.parametrize(('program', 'ranks'), [('train', 1), ('train', 2), ('evaluate', 1)])
def test_shared_memory_that_is_too_small_is_said_in_a_line(demo, program, ranks):
    if subprocess.run('unshare -m mount -t tmpfs none /mnt'.split()).returncode:
        pytest.skip('needs root')
    line = f'train {OPTIONS} --work-dir refused{ranks} --workers 2'
    if program == 'evaluate':
        run(f'train.py {OPTIONS} --work-dir trained', demo)
        line = 'evaluate --ckpt trained/latest.pth --workers 2'
    [line] = run(after(SHM, line), demo, expect=1, ranks=ranks).stderr.splitlines()
    assert line.startswith(f'{program}.py: /dev/shm has 0 MB free') and '--shm-size=8g' in line


def test_shared_memory_counts_the_batches_of_all_processes_of_a_machine(monkeypatch):
    """16 workers of the recipe's batch hold 34 batches of 32 MB in each process."""
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')
    disk = SimpleNamespace(free=8 * 34 * 32 * 10**6)
    monkeypatch.setattr(distributed.shutil, 'disk_usage', lambda path: disk)
    distributed.check_shared_memory(32 * 10**6, 16, 1)
    distributed.check_shared_memory(10**12, 0, 1)
    with pytest.raises(distributed.UserError, match='8300 MB free, .* 8 x 16 .* 8560 MB: .*=9g'):
        distributed.check_shared_memory(33 * 10**6, 16, 1)


def test_compiling_without_a_compiler_is_refused_before_the_first_step(demo):
    code = 'import torch._inductor.config as c; c.cpp.cxx = (None, "no-such-compiler")'
    line = f'train {OPTIONS} --work-dir uncompiled --workers 0 --compile'
    *_, line = run(after(code, line), demo, expect=1).stderr.splitlines()
    assert line.startswith('train.py: --compile does not work on this machine') and 'no-such-compiler' in line


def test_a_bug_in_a_worker_shows_its_traceback(demo):
    code = 'def collate(samples):\n    raise RuntimeError("a bug")\ntrain.data.collate = collate'
    result = run(after(code, f'train {OPTIONS} --work-dir bug --workers 1'), demo, expect=1)
    assert 'Traceback' in result.stderr and 'a bug' in result.stderr


@pytest.mark.parametrize(('name', 'number', 'ranks'), [('SIGSEGV', 1, 1), ('SIGKILL', 3, 2)])
def test_a_file_that_crashes_its_worker(demo, name, number, ranks):
    code = f"""
calls, crop_box = [], train.data.crop_box
def crashing(*arguments):
    calls.append(arguments)
    crash = len(calls) >= {number} and os.environ.get('RANK', '0') == '0'
    return os.kill(os.getpid(), signal.{name}) if crash else crop_box(*arguments)
train.data.crop_box = crashing
"""
    result = run(after(code, f'train {OPTIONS} --work-dir crash --workers 2'), demo, expect=1, ranks=ranks)
    lines = sorted(result.stderr.splitlines())
    assert len(lines) == ranks and lines[0].startswith('train.py: a loader worker has died or hangs'), lines
    assert '`prepare.py check`' in lines[0]
    assert all(line.startswith('train.py: a process of the run has died or hangs') for line in lines[1:])


# Others that do not come ----------------------------------------------------------------------------------


@pytest.mark.parametrize('rank', [0, 1])
def test_a_process_that_waits_says_for_how_many_and_where(demo, rank):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    env = {'RANK': str(rank), 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
    forked = Forked('evaluate.py --ckpt none.pth', demo, **env)
    line = f'evaluate.py: rank {rank} of 2 waits for the others at 127.0.0.1:{port}'
    wait_for(lambda: forked.out.exists() and forked.out.read_text() == f'{line}\n')
    other = Forked('evaluate.py --ckpt none.pth', demo, **{**env, 'RANK': str(1 - rank)})
    assert (forked.wait(), other.wait()) == (1, 1)
    assert forked.out.read_text() == f'{line}\n' and not other.out.read_text()
    assert 'evaluate.py: none.pth: No such file' in forked.err.read_text() + other.err.read_text()


@pytest.mark.parametrize(
    ('env', 'expected'),
    [
        ({'RANK': '0'}, "('WORLD_SIZE')"),
        ({'RANK': '0', 'WORLD_SIZE': ''}, 'invalid literal'),
        ({'RANK': '2', 'WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '29655'}, 'are 0 to 1'),
        ({'SLURM_STEP_NUM_TASKS': '4'}, 'start one torchrun per node'),
        ({'SLURM_NTASKS': '2'}, 'one of 2 tasks of srun: start one torchrun per node'),
        ({'SLURM_STEP_NUM_TASKS': '1', 'SLURM_NTASKS': '8'}, 'none.pth: No such file'),
    ],
)
def test_variables_of_launchers_that_do_not_fit(demo, env, expected):
    [line] = run('evaluate.py --ckpt none.pth', demo, expect=1, **env).stderr.splitlines()
    assert line.startswith('evaluate.py: ') and expected in line


def test_a_port_that_is_in_use_is_named(demo):
    with socket.create_server(('', 0)) as taken:
        port = str(taken.getsockname()[1])
        env = {'RANK': '0', 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
        result = run('train.py --demo', demo, expect=1, **env)
    line = result.stderr.splitlines()[-1]
    assert 'address already in use' in line and 'MASTER_PORT' in line


# Bad samples ----------------------------------------------------------------------------------------------


def test_counts_are_true_and_a_name_takes_one_line(tmp_path):
    """Two samples of each batch are there after two tries that failed."""
    guard = Guard(tmp_path, 10, 0.01)
    bad = ['a\nb.mp4: broken', 'c.mp4: it\rsays so']
    batch = {'video': data.Batch(torch.zeros(2), torch.zeros(2), ['d.mp4', 'e.mp4'], bad)}
    for _ in range(10):
        assert guard.ask([batch], 0) == (False, 0)
    with pytest.raises(distributed.UserError, match='22 of the 44 samples drawn in this epoch'):
        guard.ask([batch], 0)
    guard.close()
    text = (tmp_path / 'bad_samples.txt').read_text()
    assert text == 'a\\nb.mp4: broken\nc.mp4: it\\rsays so\n'
    again = Guard(tmp_path, 10, 0.01)
    again.ask([batch], 1)
    again.close()
    assert (tmp_path / 'bad_samples.txt').read_text() == text and again.unreadable == 2


# Signals --------------------------------------------------------------------------------------------------


def test_a_second_signal_ends_the_wait_for_a_disk_that_hangs(demo):
    code = """
import time
calls, opened = [], train.data.open_image
def hangs(path):
    calls.append(path)
    return opened(path) if len(calls) < 3 else time.sleep(1000)  # from the second step on
train.data.open_image = hangs
"""
    forked = Forked(after(code, f'train {OPTIONS} --work-dir hang --workers 1'), demo)
    wait_for(lambda: steps(demo / 'hang') == 1, 100)
    for _ in range(2):
        forked.kill(signal.SIGTERM)
        time.sleep(1)
    assert forked.poll() is None and 'another after 5 seconds ends it now' in forked.err.read_text()
    time.sleep(4.5)
    forked.kill(signal.SIGTERM)
    assert forked.wait(20) == -signal.SIGTERM


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_a_launcher_and_its_ranks_saves(demo, signum):
    """SIGUSR1, a scheduler's warning, ends torchrun; its ranks save."""
    folder = demo / f'launched{signum}'
    line = f'torchrun --nproc_per_node=2 train.py {OPTIONS} --work-dir {folder.name} --workers 1 --epochs 999'
    forked = Forked(line, demo)
    wait_for(lambda: steps(folder) > 3, 100)
    ranks_and_workers = processes_of(folder)
    assert len(ranks_and_workers) == 4
    for pid in ranks_and_workers:
        os.kill(pid, signum)
    forked.kill(signum)  # torchrun sends SIGTERM to its ranks once more
    forked.wait()
    wait_for(lambda: not processes_of(folder))
    assert f'stopped by {signum.name} and saved' in forked.out.read_text()
    assert checkpoint_in(folder)['step'] == steps(folder)


@pytest.mark.parametrize(
    ('name', 'code', 'options', 'status'),
    [
        ('closed', '', '--epochs 99 --workers 1', 128 + signal.SIGHUP),
        # As with nohup, or in a tmux that was killed
        ('lost', 'signal.signal(1, signal.SIG_IGN)\ntrain.distributed.STOP_SIGNALS.clear()', '', 0),
    ],
)
def test_a_run_whose_terminal_is_closed(demo, name, code, options, status):
    """A write fails then, and it gets SIGHUP, by which it saves; without a signal it goes on to its end."""
    terminal, inside = pty.openpty()
    code += f'\nfor i in range(3): os.dup2(os.open({os.ttyname(inside)!r}, os.O_RDWR), i)'
    code += '\nsys.stdout, sys.stderr = open(1, "w"), open(2, "w")'
    forked, folder = Forked(after(code, f'train {OPTIONS} {options} --work-dir {name}'), demo), demo / name
    wait_for(lambda: forked.poll() is None and os.read(terminal, 10000) and steps(folder) > 3, 100)
    os.close(inside)
    os.close(terminal)
    assert forked.wait() == status
    assert checkpoint_in(folder)['step'] == steps(folder) >= (8 if name == 'lost' else 4)
