"""A run that is killed and resumed ends as one that never was, bit for bit; nothing that fails loses it."""

import fcntl
import functools
import os
import shutil
import signal
import socket

import pytest
import torch
from conftest import ROOT, SMALL, Forked, checkpoint_in, processes_of, records, run, same, wait_for

from runtime.distributed import processes

OPTIONS = f'{SMALL} --epochs 3 --videos-per-gpu 4 --images-per-gpu 5 --log-interval 1 --no-validate'
OPTIONS += ' --val-interval 2'
SAVE_EACH_STEP = '--save-minutes 0.00001'

# Runs train.py, but when one process calls a function for the N-th time, it sends a signal to itself, to its
# group (with its workers) or to its launcher, or raises an exception if that is signal 0; once only.
DIES = """
import importlib, os, pathlib, sys
import train
name, number, rank, signum, target, marker, *arguments = sys.argv[1:]
module, name = importlib.import_module(name.rpartition('.')[0]), name.rpartition('.')[2]
function, calls = getattr(module, name), []
def dying(*args, **kwargs):
    calls.append(name)
    if len(calls) == int(number) and os.environ.get('RANK', '0') == rank and not os.path.exists(marker):
        pathlib.Path(marker).touch()
        if not int(signum):
            raise KeyError('a bug')
        os.kill({'itself': os.getpid(), 'group': 0, 'launcher': os.getppid()}[target], int(signum))
    return function(*args, **kwargs)
setattr(module, name, dying)
train.main(arguments)
"""


@pytest.fixture(scope='module', autouse=True)
def environment():
    """Bits are compared, and a machine may have fewer GPUs than processes here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CUDA_VISIBLE_DEVICES', '')
        patch.setenv('PYTHONPATH', str(ROOT))  # for what torchrun starts
        yield


@pytest.fixture(scope='module')
def dies(demo):
    """A function that gives the line of a run that dies: which process, in which call of which function."""
    (demo / 'dies.py').write_text(DIES)
    return lambda function, number, folder, rank=0, signum=signal.SIGKILL, target='itself': (
        f'dies.py {function} {number} {rank} {int(signum)} {target} {folder}.died '
        f'{OPTIONS} --workers 1 --work-dir {folder} --resume'
    )


def final(folder):
    """Everything of the last checkpoint that a run determines."""
    saved = checkpoint_in(folder)
    momentum = {f'momentum {i}': s['momentum_buffer'] for i, s in saved['optimizer']['state'].items()}
    return {**saved['model'], **momentum}


@pytest.fixture(scope='module')
def undisturbed(demo):
    """A function that gives what a run with so many processes ends with."""

    @functools.cache
    def of(ranks):
        run(f'train.py {OPTIONS} --workers 1 --work-dir undisturbed{ranks}', demo, ranks=ranks)
        return final(demo / f'undisturbed{ranks}')

    return of


def steps_of(folder):
    """The (epoch, step) of each line of its log."""
    return [(record['epoch'], record['step']) for record in records(folder, 'step')]


def test_one_process_that_accumulates_learns_what_two_do(undisturbed, demo, dies):
    """The same samples, dropout and gradients but for the order of a sum; resumed, the same bits."""
    line = f'train.py {OPTIONS} --accumulate 2 --workers 1'
    assert '2 steps an epoch of 1 x 2 x 4 videos' in run(f'{line} --work-dir accumulated', demo).stdout
    pair, whole = undisturbed(2), final(demo / 'accumulated')
    for key, value in pair.items():
        if 'tracked' not in key:
            torch.testing.assert_close(whole[key], value, rtol=1e-4, atol=1e-6)
    norms, others = ([r['grad_norm'] for r in records(demo / f)] for f in ('undisturbed2', 'accumulated'))
    assert norms == pytest.approx(others, rel=1e-3)

    stops = dies('train.train_step', 3, 'halved', signum=signal.SIGTERM)
    run(f'{stops} --accumulate 2', demo, expect=128 + signal.SIGTERM)
    shutil.copytree(demo / 'halved', demo / 'shared')
    run(f'{line} --work-dir halved --resume', demo)
    assert same(final(demo / 'halved'), whole)
    run(f'train.py {OPTIONS} --work-dir shared --resume', demo, ranks=2)
    shared = final(demo / 'shared')
    for key in ('conv1.weight', 'layer4.0.conv2.weight', 'video_head.0.weight', 'momentum 0'):
        torch.testing.assert_close(shared[key], whole[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ('function', 'number'),
    [
        pytest.param('torch.nn.utils.clip_grad_norm_', 6, marks=pytest.mark.quick),  # in a step
        ('torch.save', 5),  # before a checkpoint is written
        ('os.fsync', 9),  # written, but not renamed
        ('os.replace', 2),  # epoch_2.pth is there, latest.pth not
    ],
)
def test_killed_in_the_middle_of(undisturbed, demo, dies, function, number):
    folder = f'killed_in_{function}'
    line = dies(function, number, folder)
    run(f'{line} {SAVE_EACH_STEP}' if function != 'os.replace' else line, demo, expect=-signal.SIGKILL)
    output = run(f'train.py {OPTIONS} --workers 2 --work-dir {folder} --resume', demo).stdout
    assert f'resuming from {folder}/' in output
    assert same(final(demo / folder), undisturbed(1))
    assert not list((demo / folder).glob('*.tmp'))


def test_a_frozen_run_resumes_exactly_and_moves_its_heads_only(undisturbed, demo, dies):
    undisturbed(1)
    options, init = f'train.py {OPTIONS} --workers 1', '--freeze --init undisturbed1/latest.pth'
    run(f'{options} {init} --work-dir whole', demo, ranks=2)
    line = f'{dies("torch.nn.utils.clip_grad_norm_", 5, "frozen")} {init} {SAVE_EACH_STEP}'
    run(line, demo, expect=-signal.SIGKILL, ranks=2)
    options += ' --work-dir frozen --resume'
    assert 'resuming from frozen/' in run(f'{options} {init}', demo, ranks=2).stdout
    whole, before = final(demo / 'whole'), final(demo / 'undisturbed1')
    assert same(final(demo / 'frozen'), whole)
    weights = [key for key in before if 'momentum' not in key]
    moved = {key.split('.')[0] for key in weights if not torch.equal(whole[key], before[key])}
    assert moved == {'video_head', 'image_head'}
    heads = [value.shape for key, value in whole.items() if '_head.' in key and 'running' not in key]
    momenta = [value.shape for key, value in whole.items() if 'momentum' in key]
    assert momenta == [shape for shape in heads if shape]
    result = run(f'{options} --init undisturbed1/latest.pth', demo, expect=1)
    assert 'frozen/latest.pth: --freeze was True there and is False now' in result.stderr


def test_three_ranks_resume_exactly(demo, dies):
    """The sum over two does not depend on their order."""
    options = '--epochs 1 --videos-per-gpu 2 --images-per-gpu 2'
    run(f'train.py {OPTIONS} {options} --workers 0 --work-dir three', demo, ranks=3)
    line = f'{dies("torch.nn.utils.clip_grad_norm_", 2, "dead", rank=1)} {options}'
    result = run(f'{line} {SAVE_EACH_STEP}', demo, ranks=3, expect=-signal.SIGKILL)
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and all('a process of the run has died or hangs' in line for line in lines)
    assert 'resuming from dead/latest.pth' in run(line, demo, ranks=3).stdout
    assert same(final(demo / 'dead'), final(demo / 'three'))


def test_a_bug_on_one_rank_ends_all_with_its_traceback_and_torchrun_restarts_them(undisturbed, demo, dies):
    line = f'{dies("torch.nn.utils.clip_grad_norm_", 3, "healed", rank=1, signum=0)} {SAVE_EACH_STEP}'
    result = run(f'torchrun --nproc_per_node=2 --max-restarts=3 {line}', demo)
    assert "KeyError: 'a bug'" in result.stderr and 'resuming from healed/latest.pth' in result.stdout
    assert same(final(demo / 'healed'), undisturbed(2))
    assert not processes_of(demo / 'healed')


def test_ranks_that_lose_their_launcher_save_and_end(undisturbed, demo, dies):
    line = dies('train.train_step', 4, 'orphaned', target='launcher')
    run(f'torchrun --nproc_per_node=2 {line}', demo, expect=-signal.SIGKILL)
    wait_for(lambda: not processes_of(demo / 'orphaned'))
    assert checkpoint_in(demo / 'orphaned')['step'] < 6  # which would be all
    output = run(f'train.py {OPTIONS} --workers 1 --work-dir orphaned --resume', demo, ranks=2).stdout
    assert 'resuming from orphaned/latest.pth' in output
    assert same(final(demo / 'orphaned'), undisturbed(2))


def test_two_launchers_train_to_the_same_weights(undisturbed, demo):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        endpoint = f'127.0.0.1:{free.getsockname()[1]}'
    line = f'torchrun --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_endpoint={endpoint} train.py'
    nodes = [Forked(f'{line} {OPTIONS} --workers 1 --work-dir two_nodes', demo) for _ in range(2)]
    assert [node.wait() for node in nodes] == [0, 0], [node.err.read_text()[-3000:] for node in nodes]
    assert same(final(demo / 'two_nodes'), undisturbed(2))


@pytest.mark.parametrize(('ranks', 'signum'), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_asked_to_stop_it_saves_and_says_so(undisturbed, demo, dies, ranks, signum):
    """The signal goes to the loader's workers too, as from a terminal or a scheduler."""
    folder = f'stopped{ranks}'
    line = dies('train.train_step', 4, folder, signum=signum, target='group')
    result = run(line, demo, expect=128 + signum, ranks=ranks)
    assert f'{signum.name}: saving before the next step' in result.stderr and 'Traceback' not in result.stderr
    assert f'stopped by {signum.name} and saved' in result.stdout
    saved, (epoch, step) = checkpoint_in(demo / folder), steps_of(demo / folder)[-1]
    steps = 4 // ranks  # of an epoch
    assert saved['step'] == steps * (epoch - 1) + step and saved['epoch'] == saved['step'] // steps
    run(f'train.py {OPTIONS} --workers 2 --work-dir {folder} --resume', demo, ranks=ranks)
    assert same(final(demo / folder), undisturbed(ranks))


def test_another_number_of_processes_goes_on_with_what_is_left(demo, dies):
    line = dies('torch.nn.utils.clip_grad_norm_', 3, 'regrouped', signum=signal.SIGTERM)
    run(line, demo, expect=128 + signal.SIGTERM)
    output = run(f'train.py {OPTIONS} --work-dir regrouped --resume', demo, ranks=2).stdout
    assert '4 steps an epoch -> 2: going on after step 1 of epoch 1' in output
    alone, together = [(1, 1), (1, 2), (1, 3)], [(1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]
    assert steps_of(demo / 'regrouped') == alone + together


def test_a_full_disk_stops_the_run_and_leaves_what_there_is(undisturbed, demo):
    undisturbed(1)
    (demo / 'full').mkdir()
    shutil.copy(demo / 'undisturbed1/epoch_2.pth', demo / 'full')
    before = (demo / 'full/epoch_2.pth').read_bytes()
    code = 'import resource as r, train; r.setrlimit(r.RLIMIT_FSIZE, (100_000, 100_000)); train.main()'
    options = '--workers 0 --work-dir full --resume'  # the limit would hold for memory that workers share too
    result = run(['-c', code, *OPTIONS.split(), *options.split()], demo, expect=1)
    line = result.stderr.strip()
    assert line.startswith('train.py: full/epoch_3.pth cannot be written (') and '\n' not in line
    names = {path.name for path in (demo / 'full').iterdir() if not path.name.startswith('events.')}
    assert names == {'epoch_2.pth', 'log.jsonl', 'bad_samples.txt'}
    assert (demo / 'full/epoch_2.pth').read_bytes() == before
    run(f'train.py {OPTIONS} --workers 1 --work-dir full --resume', demo)
    assert same(final(demo / 'full'), undisturbed(1))


def test_the_signal_of_a_dead_worker_does_not_interrupt_the_line_about_it(capsys):
    """It can come after the broken connection, when the line is being printed."""

    def report(*_):
        raise RuntimeError('DataLoader worker is killed by signal: Killed.')

    before = signal.signal(signal.SIGCHLD, report)
    try:
        with pytest.raises(SystemExit), processes('train.py'):
            raise ConnectionResetError(104, 'Connection reset by peer')
        os.kill(os.getpid(), signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, before)
    line = capsys.readouterr().err
    assert line.startswith('train.py: a loader worker has died') and line.count('\n') == 1


def test_a_second_run_keeps_out_of_the_folder(demo):
    (demo / 'held').mkdir()
    with open(demo / 'held/log.jsonl', 'w') as log:
        fcntl.lockf(log, fcntl.LOCK_EX)
        result = run(f'train.py {OPTIONS} --work-dir held --resume', demo, expect=1)
    assert result.stderr.strip() == 'train.py: held is in use by a run; --work-dir takes another folder'


def test_a_validation_that_does_not_end_loses_nothing(undisturbed, demo, dies):
    line = dies('evaluate.score_views', 1, 'invalid').replace('--no-validate', '')
    run(line, demo, expect=-signal.SIGKILL)
    assert (checkpoint_in(demo / 'invalid')['epoch'], checkpoint_in(demo / 'invalid')['step']) == (1, 8)
    run(f'train.py {OPTIONS} --workers 1 --work-dir invalid --resume'.replace('--no-validate', ''), demo)
    assert same(final(demo / 'invalid'), undisturbed(1))
    assert steps_of(demo / 'invalid') == [(epoch, step) for epoch in (1, 2, 3) for step in range(1, 5)]
    assert [record['epoch'] for record in records(demo / 'invalid', 'mode')] == [2, 3]


def test_a_demo_starts_anew_over_a_demo_only(undisturbed, demo):
    """Files that no run has written are left alone."""
    undisturbed(1)
    again = shutil.copytree(demo / 'undisturbed1', demo / 'again')
    names = 'resnet50.pth', 'epoch_1_backup.pth', 'events.out.tfevents.1', 'x.pth.tmp', 'notes.tmp'
    for name in names:
        (again / name).write_text(name)
    line = f'train.py {OPTIONS} --workers 1 --epochs 1 --work-dir'
    run(f'{line} again', demo)
    assert 'all 1 epochs are done: nothing is left to train' in run(f'{line} again --resume', demo).stdout
    assert all((again / name).read_text() == name for name in names)
    assert {path.name for path in again.glob('*.pth')} == {'epoch_1.pth', 'latest.pth', *names[:2]}
    assert len(records(again)) == 4
    (demo / 'noted').mkdir()
    (demo / 'noted/bad_samples.txt').write_text('mine\n')
    run(f'{line} noted', demo)
    assert (demo / 'noted/bad_samples.txt').read_text() == 'mine\n'


def test_other_settings_take_effect_on_resume(undisturbed, demo):
    undisturbed(1)
    shutil.copytree(demo / 'undisturbed1', demo / 'changed')
    options = '--epochs 4 --weight-decay 0.01 --momentum 0.8 --precision fp16'
    output = run(f'train.py {OPTIONS} {options} --workers 1 --work-dir changed --resume', demo).stdout
    assert 'weight_decay 0.0001 -> 0.01' in output and 'fp16 (as asked)' in output
    [group] = checkpoint_in(demo / 'changed')['optimizer']['param_groups']
    assert (group['weight_decay'], group['momentum']) == (0.01, 0.8)


def test_labels_that_change_their_meaning_are_refused_on_resume(demo):
    lines = (demo / 'data/demo/video_train.txt').read_text().splitlines()
    labels = (demo / 'data/demo/video_labels.txt').read_text().splitlines()

    def check(said, lines, labels, options='', status=1):
        (demo / 'list.txt').write_text('\n'.join(lines))
        (demo / 'names.txt').write_text('\n'.join(labels))
        options += ' --video-list list.txt --video-labels names.txt --video-only --workers 1 --epochs 1'
        result = run(f'train.py {OPTIONS} {options} --work-dir named --resume', demo, status)
        assert said in result.stdout + result.stderr

    check('starting afresh', lines, labels, status=0)
    other = [labels[0], 'other', *labels[2:]]
    check("video label 1 was 'stripes falling' there and is 'other' now", lines, other)
    swapped = [f'{line[:-1]}{(int(line[-1]) + 1) % 8}' for line in lines]
    check('the same videos have other labels now than when it was saved', swapped, labels)
    check('changed since the checkpoint: the list of training videos', lines[:-1], labels, status=0)
    check('named/latest.pth: --width was 8 there and is 24 now', lines, labels, '--width 24')
