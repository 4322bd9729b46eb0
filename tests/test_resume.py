"""A run that is killed and resumed ends as one that never was, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

OPTIONS = (
    '--demo --width 8 --epochs 3 --videos-per-gpu 4 --images-per-gpu 5 --log-interval 1 --val-interval 2'
)


def final(folder):
    """Everything of the last checkpoint that a run determines."""
    checkpoint = torch.load(folder / 'latest.pth', weights_only=True)
    momentum = {f'momentum {i}': s['momentum_buffer'] for i, s in checkpoint['optimizer']['state'].items()}
    return {**checkpoint['model'], **momentum}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope='module', params=[1, 2])
def undisturbed(request, demo):
    """(processes, what a run with so many of them ends with)."""
    folder = f'undisturbed{request.param}'
    run(f'{launch(request.param)} {OPTIONS} --workers 1 --work-dir {folder}', demo)
    return request.param, final(demo / folder)


def launch(processes):
    return 'train.py' if processes == 1 else f'torchrun --nproc_per_node={processes} train.py'


def start_and_stop(demo, processes, folder, after_lines, signum, workers, save_minutes):
    """Start a run and send it a signal once its log has so many lines; gives its exit code."""
    line = [sys.executable]
    line += (
        []
        if processes == 1
        else ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    )
    line += [str(ROOT / 'train.py'), *OPTIONS.split(), '--work-dir', folder, '--workers', str(workers)]
    line += ['--save-minutes', str(save_minutes), '--resume']
    process = subprocess.Popen(
        line, cwd=demo, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    log = demo / folder / 'log.jsonl'
    while process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) >= after_lines:
            if signum == signal.SIGKILL:
                kill_everything_with(folder)
            else:
                os.killpg(
                    process.pid, signum
                )  # to the loader's workers too, as a terminal or a scheduler does
            break
        time.sleep(0.02)
    process.wait(timeout=120)
    return process.returncode


def kill_everything_with(argument):
    """SIGKILL for a launcher, its ranks and their workers, which torchrun puts into sessions of their own."""
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            if argument.encode() in path.read_bytes().split(b'\0'):
                os.kill(int(path.parent.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue


@pytest.mark.parametrize(('after_lines', 'workers'), [(3, 2), (9, 0)])
def test_killed_and_resumed(undisturbed, demo, after_lines, workers):
    processes, expected = undisturbed
    folder = f'killed{processes}_{after_lines}'
    code = start_and_stop(demo, processes, folder, after_lines, signal.SIGKILL, workers, save_minutes=0.001)
    assert code == -signal.SIGKILL
    output = run(f'{launch(processes)} {OPTIONS} --workers 1 --work-dir {folder} --resume', demo).stdout
    assert f'resuming from {folder}/' in output
    assert same(final(demo / folder), expected)


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_says_so(undisturbed, demo, signum):
    processes, expected = undisturbed
    if processes > 1:
        pytest.skip('torchrun passes signals on in its own time')
    folder = f'stopped{signum.value}'
    code = start_and_stop(demo, processes, folder, 4, signum, 1, save_minutes=10)
    assert code == 128 + signum
    records = (demo / folder / 'log.jsonl').read_text().splitlines()
    saved = torch.load(demo / folder / 'latest.pth', weights_only=True)
    steps = [json.loads(line) for line in records if 'step' in json.loads(line)]
    assert (saved['epoch'], saved['done']['video'] // 4) == (steps[-1]['epoch'] - 1, steps[-1]['step'])
    run(f'{launch(processes)} {OPTIONS} --workers 2 --work-dir {folder} --resume', demo)
    assert same(final(demo / folder), expected)


def test_a_torn_newest_checkpoint_is_skipped(undisturbed, demo):
    processes, expected = undisturbed
    folder = f'undisturbed{processes}'
    torn = demo / folder / 'latest.pth'
    whole = torn.read_bytes()
    torn.unlink()  # it may be a hard link of epoch_3.pth
    torn.write_bytes(whole[: len(whole) // 2])
    for name in ('epoch_3.pth', 'best.pth'):  # they hold the end of the run too
        (demo / folder / name).unlink()
    output = run(f'{launch(processes)} {OPTIONS} --workers 1 --work-dir {folder} --resume', demo).stdout
    assert f'skipping {folder}/latest.pth: not a checkpoint, or a damaged one' in output
    assert f'resuming from {folder}/' in output
    assert same(final(demo / folder), expected)


def test_nothing_to_resume_starts_afresh(demo):
    output = run(f'train.py {OPTIONS} --workers 1 --work-dir fresh --resume --epochs 1', demo).stdout
    assert 'nothing to resume in fresh: starting afresh' in output
