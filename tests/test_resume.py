"""A run that is killed and resumed ends as one that never was, bit for bit; nothing that fails loses it."""

import fcntl
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

from runtime.distributed import processes
from runtime.guard import Guard

OPTIONS = (
    '--demo --width 8 --epochs 3 --videos-per-gpu 4 --images-per-gpu 5 --log-interval 1 --val-interval 2 '
    '--no-validate'
)
SAVE_EACH_STEP = '--save-minutes 0.0001'
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run']

# Runs train.py, but one process sends itself a signal when it calls a function for the N-th time, or raises
# an exception if that is signal 0; once only.
DIES = f"""
import importlib, os, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import train
name, number, rank, signum, marker, *arguments = sys.argv[1:]
module, name = importlib.import_module(name.rpartition('.')[0]), name.rpartition('.')[2]
function, calls = getattr(module, name), []
def dying(*args, **kwargs):
    calls.append(name)
    if len(calls) == int(number) and os.environ.get('RANK', '0') == rank and not os.path.exists(marker):
        pathlib.Path(marker).touch()
        if not int(signum):
            raise KeyError('a bug')
        os.kill(os.getpid(), int(signum))
    return function(*args, **kwargs)
setattr(module, name, dying)
train.main(arguments)
"""


@pytest.fixture(scope='module', autouse=True)
def no_gpu():
    """Bits are compared, and a machine may have fewer GPUs than processes here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CUDA_VISIBLE_DEVICES', '')
        patch.setenv('OMP_NUM_THREADS', '1')  # as `run` has it
        yield


@pytest.fixture(scope='module')
def dies(demo):
    """A function that gives the line of a run that dies: which process, in which call of which function."""
    (demo / 'dies.py').write_text(DIES)
    return lambda function, number, folder, rank=0, signum=signal.SIGKILL: (
        f'dies.py {function} {number} {rank} {int(signum)} {folder}.died '
        f'{OPTIONS} --workers 1 --work-dir {folder} --resume'
    )


def final(folder):
    """Everything of the last checkpoint that a run determines."""
    checkpoint = torch.load(folder / 'latest.pth', weights_only=True)
    momentum = {f'momentum {i}': s['momentum_buffer'] for i, s in checkpoint['optimizer']['state'].items()}
    return {**checkpoint['model'], **momentum}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope='module')
def undisturbed(demo):
    """What a run with so many processes ends with."""
    ends = {}

    def of(processes):
        if processes not in ends:
            folder = f'undisturbed{processes}'
            run(f'{launch(processes)} {OPTIONS} --workers 1 --work-dir {folder}', demo)
            ends[processes] = final(demo / folder)
        return ends[processes]

    return of


def launch(processes):
    return 'train.py' if processes == 1 else f'torchrun --nproc_per_node={processes} train.py'


def start(demo, processes, folder, after_lines, options=''):
    """Start a run, and come back once its log has so many lines."""
    line = [] if processes == 1 else [*TORCHRUN[1:], '--standalone', f'--nproc_per_node={processes}']
    line = [sys.executable, *line, str(ROOT / 'train.py'), *OPTIONS.split(), *options.split()]
    line += ['--work-dir', folder, '--resume']
    with open(demo / f'{folder}.txt', 'w') as out:
        process = subprocess.Popen(line, cwd=demo, stdout=out, stderr=out, start_new_session=True)
    log = demo / folder / 'log.jsonl'
    while not log.exists() or len(log.read_text().splitlines()) < after_lines:
        assert process.poll() is None
        time.sleep(0.02)
    return process


def processes_with(argument):
    """Everything that runs with this argument: a launcher, its ranks, their workers."""
    found = []
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            if argument.encode() in path.read_bytes().split(b'\0'):
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_one_process_that_accumulates_learns_what_two_do(demo):
    """The same samples and dropout, the same gradients but for the order of a sum; resumed, the same bits."""
    options = '--videos-per-gpu 4 --images-per-gpu 5 --epochs 2 --no-validate'
    run(f'torchrun --nproc_per_node=2 train.py {OPTIONS} {options} --workers 1 --work-dir pair', demo)
    line = f'train.py {OPTIONS} {options} --accumulate 2 --workers 1'
    assert '4 steps an epoch of 1 x 2 x 4 videos' in run(f'{line} --work-dir accumulated', demo).stdout
    pair, accumulated = final(demo / 'pair'), final(demo / 'accumulated')
    for key, value in pair.items():
        if 'running' not in key and 'tracked' not in key:
            torch.testing.assert_close(accumulated[key], value, rtol=1e-4, atol=1e-6)
    records = [
        [json.loads(line) for line in (demo / f'{name}/log.jsonl').read_text().splitlines()]
        for name in ('pair', 'accumulated')
    ]
    assert [r['grad_norm'] for r in records[0]] == pytest.approx(
        [r['grad_norm'] for r in records[1]], rel=1e-3
    )


def test_accumulation_resumes_exactly_with_one_process_or_two(demo, dies):
    """As many batches to a step, however they are shared out: the order of the samples stays."""
    options = '--videos-per-gpu 4 --images-per-gpu 5 --epochs 2 --workers 1'
    run(f'train.py {OPTIONS} {options} --accumulate 2 --work-dir whole', demo)
    line = dies('train.train_step', 3, 'halved', signum=signal.SIGTERM)
    run(f'{line} {options} --accumulate 2', demo, expect=128 + signal.SIGTERM)
    shutil.copytree(demo / 'halved', demo / 'shared')
    run(f'train.py {OPTIONS} {options} --accumulate 2 --work-dir halved --resume', demo)
    assert same(final(demo / 'halved'), final(demo / 'whole'))
    run(f'torchrun --nproc_per_node=2 train.py {OPTIONS} {options} --work-dir shared --resume', demo)
    whole, shared = final(demo / 'whole'), final(demo / 'shared')
    for key in ('conv1.weight', 'layer4.0.conv2.weight', 'video_head.4.weight', 'momentum 0'):
        torch.testing.assert_close(shared[key], whole[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('processes', [1, 2])
def test_everything_killed_at_once(undisturbed, demo, processes):
    folder = f'killed{processes}'
    process = start(demo, processes, folder, 3, f'--workers 2 {SAVE_EACH_STEP}')
    for pid in processes_with(folder):
        os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    output = run(f'{launch(processes)} {OPTIONS} --workers 0 --work-dir {folder} --resume', demo).stdout
    assert f'resuming from {folder}/' in output
    assert same(final(demo / folder), undisturbed(processes))


@pytest.mark.parametrize(
    ('function', 'number'),
    [
        ('torch.nn.utils.clip_grad_norm_', 11),  # in a step
        ('torch.save', 9),  # before a checkpoint is written
        ('os.fsync', 15),  # written, but not renamed
        ('os.replace', 2),  # epoch_2.pth is there, latest.pth not
        ('evaluate.score_views', 1),  # in a validation
    ],
)
def test_killed_in_the_middle_of(undisturbed, demo, dies, function, number):
    folder = f'killed in {function}'.replace(' ', '_')
    line = dies(function, number, folder)
    if function != 'os.replace':
        line += f' {SAVE_EACH_STEP}'
    if function == 'evaluate.score_views':
        line = line.replace('--no-validate', '')
    run(line, demo, expect=-signal.SIGKILL)
    output = run(f'train.py {OPTIONS} --workers 2 --work-dir {folder} --resume', demo).stdout
    assert f'resuming from {folder}/' in output
    assert same(final(demo / folder), undisturbed(1))
    assert not list((demo / folder).glob('*.tmp'))


@pytest.mark.parametrize('processes', [1, 2])
def test_a_frozen_run_resumes_exactly_and_moves_its_heads_only(undisturbed, demo, dies, processes):
    undisturbed(1)
    options, folder = '--freeze --init undisturbed1/latest.pth', f'frozen{processes}'
    line = f'{launch(processes)} {OPTIONS} {options} --workers 1 --work-dir whole_{folder}'
    assert 'only the heads learn' in run(line, demo).stdout
    torchrun = launch(processes).removesuffix('train.py')
    line = f'{torchrun}{dies("torch.nn.utils.clip_grad_norm_", 11, folder)} {options} {SAVE_EACH_STEP}'
    run(line, demo, expect=-signal.SIGKILL if processes == 1 else 1)
    line = f'{launch(processes)} {OPTIONS} --workers 1 --work-dir {folder} --resume'
    assert f'resuming from {folder}/' in run(f'{line} {options}', demo).stdout
    whole, before = final(demo / f'whole_{folder}'), final(demo / 'undisturbed1')
    assert same(final(demo / folder), whole)
    weights = [key for key in before if 'momentum' not in key]
    moved = {key.split('.')[0] for key in weights if not torch.equal(whole[key], before[key])}
    assert moved == {'video_head', 'image_head'}
    saved = torch.load(demo / folder / 'latest.pth', weights_only=True)
    heads = [value.shape for key, value in saved['model'].items() if '_head.' in key and 'running' not in key]
    momenta = [state['momentum_buffer'].shape for state in saved['optimizer']['state'].values()]
    assert momenta == [shape for shape in heads if shape]
    records = [json.loads(line) for line in (demo / folder / 'log.jsonl').read_text().splitlines()]
    assert all(record['frozen'] for record in records)
    result = run(f'{line} --init undisturbed1/latest.pth', demo, expect=1)
    assert f'{folder}/latest.pth: has --freeze True, now False' in result.stderr


def test_torchrun_restarts_a_run_of_which_a_rank_dies(demo, dies):
    """With three ranks, as the sums over two do not depend on their order."""
    options = '--width 4 --videos-per-gpu 3 --images-per-gpu 4'
    run(f'torchrun --nproc_per_node=3 train.py {OPTIONS} {options} --workers 1 --work-dir three', demo)
    line = dies('torch.nn.utils.clip_grad_norm_', 4, 'healed', rank=1)
    output = run(f'torchrun --nproc_per_node=3 --max-restarts=3 {line} {options} {SAVE_EACH_STEP}', demo)
    assert 'resuming from healed/latest.pth' in output.stdout
    assert same(final(demo / 'healed'), final(demo / 'three'))


def test_ranks_that_lose_their_launcher_save_and_end(undisturbed, demo):
    process = start(demo, 2, 'orphaned', 2, '--workers 1')
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while processes_with('orphaned'):
        assert time.monotonic() < end
        time.sleep(0.1)
    output = run(f'{launch(2)} {OPTIONS} --workers 1 --work-dir orphaned --resume', demo).stdout
    assert 'resuming from orphaned/latest.pth' in output
    assert same(final(demo / 'orphaned'), undisturbed(2))


def test_two_launchers_train_to_the_same_weights(undisturbed, demo):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        endpoint = f'127.0.0.1:{free.getsockname()[1]}'
    line = [
        *TORCHRUN,
        '--nnodes=2',
        '--nproc_per_node=1',
        '--rdzv_backend=c10d',
        f'--rdzv_endpoint={endpoint}',
    ]
    line += [str(ROOT / 'train.py'), *OPTIONS.split(), '--workers', '1', '--work-dir', 'two nodes']
    # As one launcher of two processes sets it: the number of threads decides how sums are rounded.
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    quiet = {'cwd': demo, 'env': env, 'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
    nodes = [subprocess.Popen(line, **quiet) for _ in range(2)]
    assert [node.wait(timeout=200) for node in nodes] == [0, 0]
    assert same(final(demo / 'two nodes'), undisturbed(2))


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_says_so(undisturbed, demo, signum):
    folder = f'stopped{signum.value}'
    process = start(demo, 1, folder, 4, '--workers 1')
    os.killpg(process.pid, signum)  # to the loader's workers too, as a terminal or a scheduler does
    assert process.wait(timeout=60) == 128 + signum
    output = (demo / f'{folder}.txt').read_text()
    assert f'{signum.name}: saving after this step' in output
    assert f'stopped by {signum.name} and saved' in output and 'Traceback' not in output
    records = [json.loads(line) for line in (demo / folder / 'log.jsonl').read_text().splitlines()]
    steps = [record for record in records if 'step' in record]
    saved = torch.load(demo / folder / 'latest.pth', weights_only=True)
    assert (
        saved['step'] == 8 * saved['epoch'] + steps[-1]['step'] and saved['epoch'] == steps[-1]['epoch'] - 1
    )
    run(f'{launch(1)} {OPTIONS} --workers 2 --work-dir {folder} --resume', demo)
    assert same(final(demo / folder), undisturbed(1))


def test_a_reader_that_has_gone_does_not_end_the_run(undisturbed, demo):
    line = [sys.executable, str(ROOT / 'train.py'), *OPTIONS.split(), '--workers', '1', '--work-dir', 'piped']
    process = subprocess.Popen(line, cwd=demo, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait(timeout=60) == 0
    assert same(final(demo / 'piped'), undisturbed(1))


def test_another_number_of_processes_goes_on_with_what_is_left(demo, dies):
    line = dies('torch.nn.utils.clip_grad_norm_', 3, 'regrouped', signum=signal.SIGTERM)
    run(line, demo, expect=128 + signal.SIGTERM)
    output = run(f'torchrun --nproc_per_node=2 train.py {OPTIONS} --work-dir regrouped --resume', demo).stdout
    assert '8 steps an epoch -> 4: going on after step 1 of epoch 1' in output
    steps = [json.loads(line) for line in (demo / 'regrouped/log.jsonl').read_text().splitlines()]
    steps = [(record['epoch'], record['step']) for record in steps if 'step' in record]
    assert steps == [
        *((1, i) for i in (1, 2, 3)),
        *((1, i) for i in (2, 3, 4)),
        *((e, i) for e in (2, 3) for i in range(1, 5)),
    ]


def test_a_full_disk_stops_the_run_and_leaves_what_there_is(undisturbed, demo):
    undisturbed(1)
    (demo / 'full').mkdir()
    shutil.copy(demo / 'undisturbed1/epoch_2.pth', demo / 'full')
    before = (demo / 'full/epoch_2.pth').read_bytes()
    options = [*OPTIONS.split(), '--workers', '0']  # the limit would hold for the memory that they share too
    result = subprocess.run(
        [sys.executable, str(ROOT / 'train.py'), *options, '--work-dir', 'full', '--resume'],
        cwd=demo,
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert result.returncode == 1
    line = result.stderr.strip()
    assert line.startswith('train.py: full/epoch_3.pth cannot be written (') and '\n' not in line
    assert 'the older checkpoints are intact' in line
    names = {path.name for path in (demo / 'full').iterdir() if not path.name.startswith('events.')}
    assert names == {'epoch_2.pth', 'log.jsonl', 'bad_samples.txt'}
    assert (demo / 'full/epoch_2.pth').read_bytes() == before
    run(f'train.py {OPTIONS} --workers 1 --work-dir full --resume', demo)
    assert same(final(demo / 'full'), undisturbed(1))


def test_a_killed_loader_worker_ends_the_run_with_a_line(demo, dies):
    result = run(dies('data.crop_box', 30, 'worker'), demo, expect=1)
    assert result.stderr.startswith('train.py: a loader worker has died or hangs')
    assert 'DataLoader worker' in result.stderr and 'Traceback' not in result.stderr


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
    assert capsys.readouterr().err.endswith('(DataLoader worker: [Errno 104] Connection reset by peer)\n')


def test_a_second_run_keeps_out_of_the_folder(demo):
    (demo / 'held').mkdir()
    with open(demo / 'held/log.jsonl', 'w') as log:
        fcntl.lockf(log, fcntl.LOCK_EX)
        result = run(f'train.py {OPTIONS} --work-dir held --resume', demo, expect=1)
    assert result.stderr.strip() == 'train.py: held is in use by a run; --work-dir takes another folder'


def test_a_bug_on_one_rank_ends_all_with_its_traceback(demo, dies):
    start = time.monotonic()
    line = dies('torch.nn.utils.clip_grad_norm_', 3, 'bug', rank=1, signum=0)
    result = run(f'torchrun --nproc_per_node=2 {line}', demo, expect=1)
    assert "KeyError: 'a bug'" in result.stderr and time.monotonic() - start < 60
    assert not processes_with('bug')


def test_a_validation_that_does_not_end_loses_nothing(undisturbed, demo, dies):
    line = dies('evaluate.score_views', 1, 'invalid').replace('--no-validate', '')
    run(line, demo, expect=-signal.SIGKILL)
    saved = torch.load(demo / 'invalid/latest.pth', weights_only=True)
    assert (saved['epoch'], saved['step']) == (1, 16)
    run(f'train.py {OPTIONS} --workers 1 --work-dir invalid --resume'.replace('--no-validate', ''), demo)
    assert same(final(demo / 'invalid'), undisturbed(1))
    records = [json.loads(line) for line in (demo / 'invalid/log.jsonl').read_text().splitlines()]
    steps = [(record['epoch'], record['step']) for record in records if 'step' in record]
    assert steps == [(epoch, step) for epoch in (1, 2, 3) for step in range(1, 9)]
    assert [record['epoch'] for record in records if 'mode' in record] == [2, 3]


def test_other_files_in_the_work_folder_are_left_alone(demo):
    folder = demo / 'mine'
    folder.mkdir()
    names = {'resnet50.pth', 'epoch_1_backup.pth', 'events.out.tfevents.1', 'x.pth.tmp', 'notes.tmp'}
    for name in names:
        (folder / name).write_text(name)
    output = run(f'train.py {OPTIONS} --workers 1 --work-dir mine --resume --val-interval 1', demo).stdout
    assert 'nothing to resume in mine: starting afresh' in output
    assert all((folder / name).read_text() == name for name in names)
    assert (folder / 'epoch_3.pth').exists() and 'all 3 epochs are done' not in output
    output = run(f'train.py {OPTIONS} --workers 1 --work-dir mine --resume', demo).stdout
    assert 'all 3 epochs are done: nothing is left to train' in output


def test_the_demo_starts_anew_over_a_demo_only(undisturbed, demo):
    undisturbed(1)
    shutil.copytree(demo / 'undisturbed1', demo / 'again')
    run(f'train.py {OPTIONS} --workers 1 --work-dir again --epochs 1', demo)
    assert {path.name for path in (demo / 'again').glob('*.pth')} == {'epoch_1.pth', 'latest.pth'}
    records = (demo / 'again/log.jsonl').read_text().splitlines()
    assert len(records) == 8
    saved = torch.load(demo / 'again/latest.pth', weights_only=True)
    saved['settings']['demo'] = False
    torch.save(saved, demo / 'again/latest.pth')
    result = run(f'train.py {OPTIONS} --work-dir again', demo, expect=1)
    assert result.stderr.strip() == (
        'train.py: again holds a run: --resume alone goes on with it, --work-dir takes another folder'
    )
    assert (demo / 'again/epoch_1.pth').exists()
    result = run(f'train.py {OPTIONS} --work-dir again --resume undisturbed1/latest.pth', demo, expect=1)
    assert 'again holds a run: --resume alone goes on with it' in result.stderr


def test_other_settings_take_effect_on_resume(undisturbed, demo):
    undisturbed(1)
    shutil.copytree(demo / 'undisturbed1', demo / 'changed')
    options = '--epochs 4 --weight-decay 0.01 --momentum 0.8 --precision fp16'
    output = run(f'train.py {OPTIONS} {options} --workers 1 --work-dir changed --resume', demo).stdout
    assert 'changed since the checkpoint: weight_decay 0.0001 -> 0.01' in output
    group = torch.load(demo / 'changed/latest.pth', weights_only=True)['optimizer']['param_groups'][0]
    assert (group['weight_decay'], group['momentum']) == (0.01, 0.8)


def test_labels_that_change_their_meaning_are_refused_on_resume(demo):
    lists = '--val-list data/demo/video_val.txt --val-root data/demo/videos_val --no-validate --video-only'
    lines = (demo / 'data/demo/video_train.txt').read_text().splitlines()
    (demo / 'list.txt').write_text('\n'.join(lines))
    labels = (demo / 'data/demo/video_labels.txt').read_text().splitlines()
    (demo / 'names.txt').write_text('\n'.join(labels))
    line = f'train.py {OPTIONS} {lists} --video-list list.txt --video-labels names.txt --work-dir named'
    run(f'{line} --workers 1 --epochs 1', demo)

    (demo / 'names.txt').write_text('\n'.join([labels[0], 'other', *labels[2:]]))
    result = run(f'{line} --resume', demo, expect=1)
    assert "video label 1 was 'stripes falling' there and is 'other' now" in result.stderr
    (demo / 'names.txt').write_text('\n'.join(labels))
    swapped = [f'{line[:-1]}{(int(line[-1]) + 1) % 8}' for line in lines]
    (demo / 'list.txt').write_text('\n'.join(swapped))
    result = run(f'{line} --resume', demo, expect=1)
    assert 'the same videos have other labels now than when it was saved' in result.stderr
    (demo / 'list.txt').write_text('\n'.join(lines[:-1]))
    output = run(f'{line} --resume --epochs 1', demo).stdout
    assert 'changed since the checkpoint: the list of training videos' in output
    result = run(f'{line} --resume --width 24', demo, expect=1)
    assert 'named/latest.pth: has --width 8, now 24; --work-dir takes another folder' in result.stderr


def test_nothing_to_resume_starts_afresh(demo):
    output = run(f'train.py {OPTIONS} --workers 1 --work-dir fresh --resume --epochs 1', demo).stdout
    assert 'nothing to resume in fresh: starting afresh' in output


def test_a_rank_that_has_lost_its_launcher_asks_to_stop(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'any')
    before = signal.getsignal(signal.SIGINT)
    guard = Guard(tmp_path, 10, 0.01)
    try:
        assert guard.ask([], 0) == (False, 0)
        monkeypatch.setattr(os, 'getppid', lambda: -1)
        assert guard.ask([], 0) == (False, signal.SIGTERM)
    finally:
        guard.close()
        signal.signal(signal.SIGINT, before)
