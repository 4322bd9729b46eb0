"""Metrics, the dump, and the command."""

import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import DOCS, ROOT, run, write_video

import data
import evaluate
import prepare
from model import OmniSlowOnly
from runtime import checkpoint as checkpoints
from runtime import sources

REFERENCE = Path(__file__).parent / 'reference'
SMALL = {'layers': (1, 1, 1, 1), 'width': 8}


def test_metrics_equal_the_reference():
    expected = np.load(REFERENCE / 'metrics.npz')
    result = evaluate.accuracy(expected['scores'], expected['labels'])
    for ours, theirs in (('top1', 'top1'), ('top5', 'top5'), ('mean1', 'mean_class')):
        assert result[ours] == pytest.approx(float(expected[theirs]), abs=1e-12)


def test_confusions_name_the_classes_with_most_errors():
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    scores = np.eye(3)[[0, 1, 1, 2, 1, 2, 0]]
    scores[-1] = np.nan  # unreadable: wrong, but taken for nothing
    assert evaluate.confusions(scores, labels, ['a', 'b', 'c']) == [
        'a: 2 of 3 wrong, taken for b (2)',
        'b: 1 of 2 wrong, taken for c (1)',
        'c: 1 of 2 wrong, unreadable',
    ]
    assert evaluate.confusions(np.eye(3), np.arange(3), None) == []


def test_an_unreadable_sample_is_wrong_by_every_metric():
    scores = np.array([[1.0, 0, 0], [np.nan] * 3, [0, 0, 1.0]])
    result = evaluate.accuracy(scores, np.array([0, 1, 2]))
    assert result == {
        'top1': pytest.approx(2 / 3),
        'top5': pytest.approx(2 / 3),
        'mean1': pytest.approx(2 / 3),
    }
    assert evaluate.accuracy(scores, np.array([0, 0, 2]))['mean1'] == pytest.approx((0.5 + 1) / 2)


def test_metrics_by_hand():
    scores = np.eye(6)[[0, 1, 2, 2]]
    result = evaluate.accuracy(scores, np.array([0, 1, 2, 1]))
    assert result['top1'] == 0.75 and result['mean1'] == pytest.approx((1 + 0.5 + 1) / 3)


@pytest.fixture(scope='module')
def checkpoint(demo):
    """A small checkpoint with untrained weights that knows the demo's set, as train.py would write it."""
    torch.manual_seed(0)
    root = 'data/demo'
    settings = {
        'size': 56,
        'clip_len': 8,
        'frame_interval': 8,
        'val_list': f'{root}/video_val.txt',
        'val_root': f'{root}/videos_val',
        'image_val_list': f'{root}/image_val.txt',
        'image_val_root': f'{root}/images_val',
    }
    state = {
        'model': OmniSlowOnly(8, 4, **SMALL).state_dict(),
        'settings': settings,
        'video_labels': sources.read_label_map(str(demo / root / 'video_labels.txt')),
        'image_labels': sources.read_label_map(str(demo / root / 'image_labels.txt')),
    }
    torch.save(state, demo / 'small.pth')
    return demo / 'small.pth'


def views_by_hand(demo, network):
    """The 30-view scores of the demo's validation videos, one view at a time."""
    samples = sources.read_list(
        str(demo / 'data/demo/video_val.txt'), str(demo / 'data/demo/videos_val'), videos=True
    )
    dataset = data.VideoDataset(samples, 'test', size=56)
    with torch.no_grad():
        rows = [
            torch.stack([network(view[None])[0].softmax(0) for view in dataset[i].pixels]).mean(0)
            for i in range(len(dataset))
        ]
    return torch.stack(rows).numpy(), samples.labels


def test_dump(demo, checkpoint):
    result = run('evaluate.py --ckpt small.pth --dump result.pkl --workers 1', demo)
    assert '16 videos, 10 clips x 3 crops' in result.stdout and 'top-1' in result.stdout
    network = checkpoints.build(torch.load(checkpoint, weights_only=True), 'small.pth')
    scores, labels = views_by_hand(demo, network)
    with open(demo / 'result.pkl', 'rb') as file:
        dump = pickle.load(file)
    assert isinstance(dump, list) and len(dump) == 16
    for entry, row, label in zip(dump, scores, labels, strict=True):
        assert list(entry) == ['pred_score', 'pred_label', 'gt_label', 'num_classes', 'img_shape']
        assert entry['pred_score'].dtype == torch.float32 and entry['pred_score'].shape == (8,)
        for key, value in (('pred_label', row.argmax()), ('gt_label', label)):
            assert entry[key].dtype == torch.int64 and entry[key].tolist() == [value]
        assert entry['num_classes'] == 8 and entry['img_shape'] == (64, 64)
        np.testing.assert_allclose(entry['pred_score'], row, atol=1e-5)
    top1 = (scores.argmax(1) == labels).mean()
    assert f'top-1 {top1:.2%}' in result.stdout


def test_dump_is_readable_without_the_project(demo, checkpoint, tmp_path):
    run('evaluate.py --ckpt small.pth --dump alone.pkl --clips 1 --crops 1', demo)
    code = f'import pickle; print(len(pickle.load(open({str(demo / "alone.pkl")!r}, "rb"))))'
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == '16\n'


def test_two_processes_give_the_same_dump(demo, checkpoint):
    run('evaluate.py --ckpt small.pth --dump one.pkl --clips 2 --workers 0', demo)
    run('torchrun --nproc_per_node=2 evaluate.py --ckpt small.pth --dump two.pkl --clips 2 --workers 0', demo)
    one, two = (pickle.loads((demo / name).read_bytes()) for name in ('one.pkl', 'two.pkl'))
    assert len(one) == len(two) == 16
    for a, b in zip(one, two):
        torch.testing.assert_close(a['pred_score'], b['pred_score'])
        assert a['gt_label'] == b['gt_label']


def test_images(demo, checkpoint):
    output = run('evaluate.py --ckpt small.pth --images --show wrong.png', demo).stdout
    assert '12 images, centre crop' in output
    assert 'wrote wrong.png' in output and (demo / 'wrong.png').stat().st_size > 1000


def test_mistakes_are_drawn_the_surest_first(demo, monkeypatch):
    samples = sources.read_list(
        str(demo / 'data/demo/video_val.txt'), str(demo / 'data/demo/videos_val'), videos=True
    )
    samples = data.FileList(samples.paths[:4], samples.labels[:4], samples.root)  # of classes 0 to 3
    scores = np.array([[0.9, 0.1, 0, 0], [0.6, 0.3, 0.1, 0], [np.nan] * 4, [0.1, 0.7, 0, 0.2]])
    drawn = []
    monkeypatch.setattr(prepare, 'draw_rows', lambda *arguments: drawn.extend(arguments))
    dataset = data.VideoDataset(samples, 'val', 56)
    assert evaluate.show_mistakes('out.png', dataset, scores, samples.labels, ['a', 'b', 'c', 'd']) == 2
    _, rows, titles, _ = drawn
    assert [title.split(': ')[1] for title in titles] == [
        'd (20%) taken for b (70%)',
        'b (30%) taken for a (60%)',
    ]
    assert torch.equal(rows[0], dataset[3].pixels[0].transpose(0, 1)) and rows[0].shape == (8, 3, 56, 56)


def test_the_readme_s_export_gives_the_same_logits(demo, checkpoint):
    code = DOCS.split('<!-- export -->')[1].split('python -c "')[1].split('"\n```')[0]
    code = code.replace('work_dirs/omni/best.pth', 'small.pth').replace('256, 256', '64, 64')
    result = subprocess.run(
        [sys.executable, '-c', code], cwd=demo, env={**os.environ, 'PYTHONPATH': str(ROOT)}
    )
    assert result.returncode == 0
    clips = torch.randint(0, 256, (3, 3, 8, 64, 64), dtype=torch.uint8)
    network = checkpoints.build(torch.load(checkpoint, weights_only=True), 'small.pth')
    exported = torch.export.load(demo / 'network.pt2').module()
    torch.testing.assert_close(exported(clips), network(clips))


def test_classify(demo, checkpoint, tmp_path):
    video = write_video(tmp_path / 'my clip.mp4', num_frames=20)
    PIL.Image.new('RGB', (70, 50)).save(tmp_path / 'photo.jpg')
    files = [video, str(tmp_path / 'photo.jpg')]
    lines = run(['evaluate.py', '--ckpt', 'small.pth', *files], demo).stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if 'my clip.mp4' in line)
    assert len(lines[start:]) == 1 + 5 + 1 + 4
    shares = [float(line.split('%')[0]) for line in lines[start + 1 : start + 6]]
    assert shares == sorted(shares, reverse=True)
    known = sources.read_label_map(str(demo / 'data/demo/video_labels.txt'))
    assert {line.split('%')[1].strip() for line in lines[start + 1 : start + 6]} < set(known)
    (tmp_path / 'broken.mp4').write_text('no')
    result = run(['evaluate.py', '--ckpt', 'small.pth', str(tmp_path / 'broken.mp4'), *files], demo, expect=1)
    assert 'broken.mp4' in result.stderr and 'my clip.mp4 (video)' in result.stdout


def test_timeline_says_what_is_seen_when(demo, checkpoint, tmp_path):
    """Each line is the mean over the crops of one clip, and has its frames' own times."""
    times = np.cumsum([20 if i < 100 else 300 for i in range(300)])  # half a second a frame later on
    video = write_video(tmp_path / 'long.mp4', num_frames=300, times=times)
    output = run(['evaluate.py', '--ckpt', 'small.pth', '--timeline', '--clips', '4', video], demo).stdout
    lines = output.split('(video)\n')[1].splitlines()
    known = (times - times[0])[data.sample_frames(300, num_clips=4)[:, [0, -1]]] / 600
    names = sources.read_label_map(str(demo / 'data/demo/video_labels.txt'))
    network = checkpoints.build(torch.load(checkpoint, weights_only=True), 'small.pth')
    views = data.VideoDataset(None, 'test', 56, num_clips=4).load(
        video, None
    )  # three crops of the four clips
    assert len(lines) == 4
    for number, line in enumerate(lines):
        scores = network(views[number::4]).softmax(1).mean(0)
        start, end, rest = re.fullmatch(r' +([\d.]+) to +([\d.]+) s  (.*)', line).groups()
        assert [float(start), float(end)] == pytest.approx(known[number], abs=0.06)
        assert rest.split(', ')[0] == f'{names[int(scores.argmax())]} {scores.max():.1%}'


def test_ctrl_c_shows_no_traceback(demo, checkpoint):
    line = [sys.executable, str(ROOT / 'evaluate.py'), '--ckpt', 'small.pth', '--clips', '1000']
    process = subprocess.Popen(line, cwd=demo, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert 'computing in' in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert 'Traceback' not in process.stderr.read() and process.wait() == -signal.SIGINT


def test_an_unreadable_video_counts_as_wrong(demo, checkpoint):
    videos = demo / 'data/demo/videos_val'
    (videos / 'bad.mp4').write_text('no video')
    good = (demo / 'data/demo/video_val.txt').read_text().splitlines()[:3]
    (demo / 'some.txt').write_text('\n'.join([*good, 'bad.mp4 0']))
    result = run('evaluate.py --ckpt small.pth --val-list some.txt --clips 1 --dump bad.pkl', demo)
    assert 'bad.mp4' in result.stderr and '1 of them unreadable' in result.stdout
    entry = pickle.loads((demo / 'bad.pkl').read_bytes())[3]
    assert entry['gt_label'] == 0 and entry['pred_label'] != 0


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('--ckpt missing.pth', 'missing.pth'),
        ('--ckpt data/demo/video_val.txt', 'video_val.txt: not a checkpoint'),
        ('--ckpt small.pth --dump nowhere/result.pkl', 'nowhere/result.pkl'),
        ('--ckpt small.pth --dump data', 'data: no file that can be written'),
        ('--ckpt small.pth --val-list nowhere.txt', 'nowhere.txt'),
        ('--ckpt nameless.pth --val-list data', 'data: 1 class folders; which of the 8 classes they'),
        ('--ckpt small.pth --val-list bad_label.txt', 'bad_label.txt:2: label 8 is out of range'),
        ('--ckpt small.pth --clips 0', "'0' is not a whole number of at least 1"),
        ('--ckpt small.pth --clips -3', 'clips'),
        ('--ckpt small.pth --show nowhere/wrong.png', 'nowhere/wrong.png'),
        ('--ckpt small.pth --show wrong.png a.mp4', '--show and --val-list measure a set'),
        ('--ckpt small.pth --timeline', '--timeline needs a video'),
        ('--ckpt small.pth --val-list data', 'data/demo: no class of this name is known; the 8 that are'),
        ('--ckpt small.pth --images a.jpg', '--images measures the image set'),
        ('--ckpt flipped.pth', 'flipped.pth: a damaged checkpoint (wrong checksum: '),
        ('--ckpt torn.pth', 'torn.pth: not a checkpoint of train.py or MMAction2, or a damaged one'),
        ('--ckpt diverged.pth', 'the network gives scores that are not numbers, computing in fp32'),
        ('--ckpt diverged.pth data/demo/images_val/dots_000.jpg', 'scores that are not numbers'),
    ],
)
def test_bad_input_gets_one_line(demo, checkpoint, fails, arguments, message):
    (demo / 'bad_label.txt').write_text('a.mp4 1\nb.mp4 8\n')
    flipped = bytearray(checkpoint.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (demo / 'flipped.pth').write_bytes(flipped)
    (demo / 'torn.pth').write_bytes(flipped[:20_000])  # which torch tells by an OSError
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {'video_labels': None}, demo / 'nameless.pth')
    state['model']['layer1.0.conv1.weight'][0] = float('nan')
    torch.save(state, demo / 'diverged.pth')
    assert message in fails(
        evaluate.main,
        arguments,
        code=2 if any(f in arguments for f in ('--clips', 'a.mp4', 'timeline', '--images')) else 1,
    )


def test_a_closed_output_is_no_mistake(demo, checkpoint):
    line = f'{sys.executable} {ROOT}/evaluate.py --ckpt small.pth data/demo/images_val/dots_000.jpg >&-'
    result = subprocess.run(line, shell=True, cwd=demo, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b'')
