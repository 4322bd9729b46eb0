"""Metrics, the dump, and the command."""

import contextlib
import csv
import fcntl
import os
import pickle
import re
import resource
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import DOCS, Forked, decode_all, run, wait_for, write_video

import data
import evaluate
from model import OmniSlowOnly
from runtime import sources

SMALL = {'layers': (1, 1, 1, 1), 'width': 8}


@pytest.mark.quick
def test_metrics_equal_the_reference():
    expected = np.load(Path(__file__).parent / 'reference/metrics.npz')
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
    assert evaluate.confusions(np.eye(3), np.arange(3), ['a', 'b', 'c']) == []


def test_an_unreadable_sample_is_wrong_by_every_metric():
    scores = np.array([[1.0, 0, 0], [np.nan] * 3, [0, 0, 1.0]])
    expected = dict.fromkeys(('top1', 'mean1'), pytest.approx(2 / 3))
    assert evaluate.accuracy(scores, np.array([0, 1, 2])) == expected
    assert evaluate.accuracy(scores, np.array([0, 0, 2]))['mean1'] == pytest.approx((0.5 + 1) / 2)


@pytest.fixture(scope='module')
def network(demo):
    """A small one with untrained weights; small.pth knows the demo's set, as if train.py had written it."""
    torch.manual_seed(0)
    network = OmniSlowOnly(8, 4, **SMALL)
    settings = {'size': 56, 'clip_len': 8, 'frame_interval': 8}
    state = {'model': network.state_dict(), 'settings': settings}
    for kind, prefix in (('video', 'val'), ('image', 'image_val')):
        settings[f'{prefix}_list'] = f'data/demo/{kind}_val.txt'
        settings[f'{prefix}_root'] = f'data/demo/{kind}s_val'
        state[f'{kind}_labels'] = names_of(demo, kind)
    torch.save(state, demo / 'small.pth')
    return network.eval()


def names_of(demo, kind):
    return (demo / f'data/demo/{kind}_labels.txt').read_text().splitlines()


@pytest.fixture(scope='module')
def videos(demo):
    return sources.read_list(f'{demo}/data/demo/video_val.txt', f'{demo}/data/demo/videos_val', videos=True)


@pytest.fixture
def evaluated(demo, network, monkeypatch, capsys):
    """A function that runs the command in this process and gives back what it printed."""

    def call(arguments, ckpt='small.pth', code=0):
        monkeypatch.chdir(demo)
        arguments = arguments if isinstance(arguments, list) else arguments.split()
        ended = 0
        try:
            evaluate.main(['--ckpt', ckpt, '--workers', '0', *arguments])
        except SystemExit as exit:
            ended = exit.code
        assert ended == code
        return capsys.readouterr()

    return call


def test_dump(demo, network, videos):
    result = run('evaluate.py --ckpt small.pth --dump result.pkl --workers 1', demo)
    assert '16 videos of 8 classes, 10 clips x 3 crops' in result.stdout and 'top-5' in result.stdout
    dataset = data.VideoDataset(videos, 'test', size=56)
    dump = pickle.loads((demo / 'result.pkl').read_bytes())
    assert isinstance(dump, list) and len(dump) == 16
    for number, (entry, label) in enumerate(zip(dump, videos.labels, strict=True)):
        assert list(entry) == ['pred_score', 'pred_label', 'gt_label', 'num_classes', 'img_shape']
        row = entry['pred_score']
        assert row.dtype == torch.float32 and row.shape == (8,)
        for key, value in (('pred_label', row.argmax()), ('gt_label', label)):
            assert entry[key].dtype == torch.int64 and entry[key].tolist() == [value]
        assert entry['num_classes'] == 8 and entry['img_shape'] == (64, 64)
        if number % 5 == 0:
            with torch.no_grad():
                views = network(dataset[number].pixels).softmax(1)
            np.testing.assert_allclose(row, views.mean(0), atol=1e-5)
    top1 = np.mean([entry['pred_label'].item() == entry['gt_label'].item() for entry in dump])
    assert f'top-1 {top1:.2%}' in result.stdout


@pytest.mark.quick
def test_images(demo, evaluated):
    output = evaluated('--images --show wrong.png').out
    assert '12 images of 4 classes, centre crop' in output and '\ntop-1 ' in output and 'top-5' not in output
    wrong = round(12 * (1 - float(re.search(r'top-1 ([\d.]+)%', output)[1]) / 100))
    assert output.endswith(f'wrote wrong.png\n8 of {wrong} mistakes\n') and wrong > 8
    assert (demo / 'wrong.png').stat().st_size > 1000


def test_mistakes_are_drawn_the_surest_first(videos, monkeypatch):
    samples = data.FileList(videos.paths[:4], videos.labels[:4], videos.root)  # of classes 0 to 3
    scores = np.array([[0.9, 0.1, 0, 0], [0.6, 0.3, 0.1, 0], [np.nan] * 4, [0.1, 0.7, 0, 0.2]])
    drawn = []
    monkeypatch.setattr(evaluate, 'draw_rows', lambda *arguments: drawn.extend(arguments))
    dataset = data.VideoDataset(samples, 'val', 56)
    assert evaluate.show_mistakes('out.png', dataset, scores, samples.labels, ['a', 'b', 'c', 'd']) == 2
    _, rows, titles, _ = drawn
    expected = ['d (20%) taken for b (70%)', 'b (30%) taken for a (60%)']
    assert [title.split(': ')[1] for title in titles] == expected
    assert torch.equal(rows[0], dataset[3].pixels[0].transpose(0, 1)) and rows[0].shape == (8, 3, 56, 56)


@pytest.mark.filterwarnings('ignore:No complete tensor')  # of torch's own
def test_the_readme_s_export_gives_the_same_logits(demo, network, monkeypatch):
    code = DOCS.split('<!-- export -->')[1].split('python -c "')[1].split('"\n```')[0]
    code = code.replace('work_dirs/omni/best.pth', 'small.pth').replace('256, 256', '64, 64')
    monkeypatch.chdir(demo)
    exec(code, {})
    clips = torch.randint(0, 256, (3, 3, 8, 64, 64), dtype=torch.uint8)
    exported = torch.export.load(demo / 'network.pt2').module()
    torch.testing.assert_close(exported(clips), network(clips))


def test_names_where_the_checkpoint_has_none(demo, evaluated):
    """As many classes as the published network has; label 3 is always likeliest."""
    network = OmniSlowOnly(400, 1000, **SMALL)
    for head in (network.video_head, network.image_head):
        torch.nn.init.zeros_(head[-1].weight)
        head[-1].bias.data = -torch.arange(len(head[-1].bias), dtype=torch.float).sub(3).abs()
    torch.save({'model': network.state_dict(), 'settings': {'size': 56}}, demo / 'official.pth')
    files = 'data/demo/images_val/dots_000.jpg data/demo/videos_val/dots_falling_000.mp4 --clips 1'
    lines = evaluated(files, 'official.pth').out.splitlines()
    assert lines[-14:-12] == [
        'no names of the 1000 image classes in the checkpoint: assuming those of ImageNet',
        'data/demo/images_val/dots_000.jpg (image)',
    ]
    assert lines[-12].endswith('%  tiger shark') and lines[-5].endswith('%  applauding')
    assert 'no names of the 400 video classes' in lines[-7] and 'Kinetics-400' in lines[-7]
    (demo / 'own.txt').write_text('\n'.join(f'own {i}a' for i in range(400)))
    output = evaluated(f'{files} --video-labels own.txt', 'official.pth').out
    assert '%  own 3a\n' in output and 'tiger shark' in output and 'no names of the 400' not in output
    (demo / 'kinetics/applauding').mkdir(parents=True)  # class folders that bear their names
    (demo / 'kinetics/applauding/1.mp4').symlink_to(demo / 'data/demo/videos_val/dots_falling_000.mp4')
    assert 'top-1 100.00%   top-5 100.00%' in evaluated('--val-list kinetics --clips 1', 'official.pth').out


def test_files_are_classified_and_a_table_is_written(demo, network, evaluated, tmp_path):
    (tmp_path / 'a, b').mkdir()
    video = write_video(tmp_path / 'a, b/clip.mp4', num_frames=20)
    photo, torn = tmp_path / 'a, b/photo.jpg', tmp_path / 'a, b/torn.jpg'
    PIL.Image.new('RGB', (70, 50)).save(photo)
    torn.write_text('no')
    command = [str(tmp_path / 'a, b'), '--csv', 'out.csv', '--features', 'files.npz', '--clips', '2']
    output = evaluated(command, code=1)
    assert f'evaluate.py: {torn}: ' in output.err and output.err.count('\n') == 1
    head, *rows = csv.reader((demo / 'out.csv').read_text().splitlines())
    assert head == ['file', 'rank', 'label', 'score']
    ranks = [[video, rank] for rank in '12345'] + [[str(photo), rank] for rank in '1234']
    assert [row[:2] for row in rows] == ranks
    assert f'{video} (video)\n' in output.out and f'{photo} (image)\n' in output.out
    shown = re.findall(r'^ +([\d.]+%)  (.+)$', output.out, re.M)
    assert [(f'{float(score):.2%}', label) for *_, label, score in rows] == shown
    for part, kind in ((rows[:5], 'video'), (rows[5:], 'image')):
        *_, labels, shares = zip(*part)
        assert list(shares) == sorted(shares, reverse=True) and set(labels) <= set(names_of(demo, kind))

    arrays = np.load(demo / 'files.npz')
    assert arrays['paths'].tolist() == [video, str(photo), str(torn)]
    assert arrays['features'].shape == (3, 32 * 8) and arrays['features'].dtype == np.float32
    views = data.VideoDataset(None, 'test', 56, num_clips=2).load(video, None)
    np.testing.assert_allclose(arrays['features'][0], network.features(views).mean(0).detach(), atol=1e-5)
    assert arrays['scores'].shape == (3, 8) and np.isfinite(arrays['scores'][0]).all()
    assert np.isnan(arrays['scores'][1]).tolist() == 4 * [False] + 4 * [True]  # images have four classes
    assert np.isnan(arrays['features'][2]).all() and np.isnan(arrays['scores'][2]).all()


def test_file_names_may_be_any_bytes_and_outputs_devices(demo, evaluated, tmp_path, monkeypatch):
    photo = tmp_path / 'ph\udcffoto.jpg'
    PIL.Image.new('RGB', (70, 50)).save(photo)
    monkeypatch.setattr(evaluate, 'say', lambda *text, **options: None)  # pytest reads UTF-8 only
    evaluated([str(photo), '--csv', 'bytes.csv', '--features', 'bytes.npz'])
    assert (demo / 'bytes.csv').read_bytes().splitlines()[1].startswith(os.fsencode(photo) + b',1,')
    assert np.load(demo / 'bytes.npz')['paths'].tolist() == [str(photo)]
    evaluated([str(photo), '--csv', '/dev/null'])
    assert not os.path.isfile('/dev/null')


def test_features_of_a_set(demo, network, evaluated):
    (demo / 'data/demo/videos_val/torn.mp4').write_text('no video')
    listed = (demo / 'data/demo/video_val.txt').read_text().splitlines()[:3]
    (demo / 'three.txt').write_text('\n'.join([listed[0], 'torn.mp4 1', *listed[1:]]))
    line = '--val-list three.txt --clips 2 --features'
    output = evaluated(f'{line} set.npz --dump set.pkl')
    assert 'unreadable, counted as wrong: data/demo/videos_val/torn.mp4' in output.err
    assert '4 videos of 8 classes, 2 clips x 3 crops, 1 of them unreadable' in output.out
    arrays = dict(np.load('set.npz'))
    assert arrays['labels'].tolist() == [0, 1, 1, 2] and arrays['scores'].shape == (4, 8)
    names = ['torn.mp4', listed[1][:-2]]
    assert arrays['paths'].tolist()[1:3] == [f'data/demo/videos_val/{name}' for name in names]
    assert np.isnan(arrays['features'][1]).all() and np.isnan(arrays['scores'][1]).all()
    for i in (0, 2, 3):
        views = data.VideoDataset(None, 'test', 56, num_clips=2).load(arrays['paths'][i], None)
        np.testing.assert_allclose(arrays['features'][i], network.features(views).mean(0).detach(), atol=1e-4)
        np.testing.assert_allclose(arrays['scores'][i], network(views).softmax(1).mean(0).detach(), atol=1e-5)
    run(f'evaluate.py --ckpt small.pth --workers 0 {line} two.npz --dump two.pkl', demo, ranks=2)
    two = np.load('two.npz')
    assert sorted(two) == ['features', 'labels', 'paths', 'scores']
    for key, value in arrays.items():
        assert (two[key] == value).all() if key == 'paths' else np.allclose(two[key], value, 1e-4, 1e-5, True)
    dumps = [pickle.loads((demo / f'{name}.pkl').read_bytes()) for name in ('set', 'two')]
    assert dumps[0][1]['gt_label'] == 1 and dumps[0][1]['pred_label'] != 1  # of the torn one
    for one, other in zip(*dumps, strict=True):
        torch.testing.assert_close(one['pred_score'], other['pred_score'])
        assert one['gt_label'] == other['gt_label'] and one['pred_label'] == other['pred_label']


@pytest.mark.parametrize(
    ('arguments', 'file'), [('--clips 1 --dump', 'full.pkl'), ('data/demo/images_val --csv', 'full.csv')]
)
def test_a_full_disk_loses_neither_the_metrics_nor_what_was_there(demo, evaluated, arguments, file):
    (demo / file).write_text('before')
    before, limits = set(os.listdir(demo)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        output = evaluated(f'{arguments} {file}', code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert output.err == f'evaluate.py: {file} cannot be written (File too large)\n'
    assert 'top-1 ' in output.out or '%  dots' in output.out
    assert (demo / file).read_text() == 'before' and set(os.listdir(demo)) == before


def test_timeline_says_what_is_seen_when(demo, network, tmp_path):
    """Each line is the mean over the crops of one clip, and has its frames' own times."""
    times = np.cumsum([20 if i < 100 else 300 for i in range(300)])  # half a second a frame later on
    video = write_video(tmp_path / 'long.mp4', num_frames=300, times=times)
    output = run(['evaluate.py', '--ckpt', 'small.pth', '--timeline', '--clips', '4', video], demo).stdout
    lines = output.split('(video)\n')[1].splitlines()[5:]  # after the five likeliest of the whole
    known = (times - times[0])[data.sample_frames(300, num_clips=4)[:, [0, -1]]] / 600
    names = names_of(demo, 'video')
    views = data.VideoDataset(None, 'test', 56, num_clips=4).load(video, None)  # (3 crops x 4 clips, ...)
    assert len(lines) == 4
    for number, line in enumerate(lines):
        scores = network(views[number::4]).softmax(1).mean(0)
        start, end, rest = re.fullmatch(r' +([\d.]+) to +([\d.]+) s  (.*)', line).groups()
        assert [float(start), float(end)] == pytest.approx(known[number], abs=0.06)
        assert rest.split(', ')[0] == f'{names[int(scores.argmax())]} {scores.max():.1%}'


def test_ctrl_c_shows_no_traceback_and_leaves_no_worker(demo, network):
    """Pressed while the workers start."""
    code = """
import fcntl, os, signal, time, evaluate
from runtime import distributed
lock = open('alive', 'w')
fcntl.flock(lock, fcntl.LOCK_EX)  # until the last process that has this file open has ended
begin, main = distributed.begin_worker, os.getpid()
def slowly(number):
    number or os.kill(main, signal.SIGINT)
    time.sleep(1)
    begin(number)
distributed.begin_worker = slowly
evaluate.main()
"""
    process = Forked(['-c', code, '--ckpt', 'small.pth', '--workers', '2'], demo)
    assert process.wait() == -signal.SIGINT and 'Traceback' not in process.err.read_text()

    def have_ended():
        with contextlib.suppress(BlockingIOError), open(demo / 'alive') as file:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) is None

    wait_for(have_ended)


@pytest.fixture(scope='module')
def broken(demo, network):
    """Checkpoints that lack something or have diverged, and a list with a label too high."""
    (demo / 'bad_label.txt').write_text('a.mp4 1\nb.mp4 8\n')
    state = torch.load(demo / 'small.pth', weights_only=True)
    torch.save(state | {'video_labels': None, 'image_labels': None}, demo / 'nameless.pth')
    state['model']['layer1.0.conv1.weight'][0] = float('nan')
    torch.save(state, demo / 'diverged.pth')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('--ckpt nope.pth', 'evaluate.py: nope.pth: No such file or directory'),
        ('--dump data', 'data: cannot be written'),
        ('--csv /proc/a.csv data/demo/images_val/dots_000.jpg', '/proc/a.csv cannot be written'),
        ('--val-list data --ckpt nameless.pth', 'not one of the 8 classes, which begin with class 0,'),
        # As many folders as classes, but nothing says which is which
        ('--images --val-list data/demo --ckpt nameless.pth', 'not one of the 4 classes, which begin with'),
        ('--val-list data', 'data/demo: not one of the 8 classes, which begin with stripes rising,'),
        ('--val-list bad_label.txt', 'bad_label.txt:2: label 8 is out of range'),
        ('--image-labels data/demo/video_labels.txt', '8 names, but the image head has another number'),
        ('--clips 0', "'0' is not a whole number of at least 1"),
        (
            '--show wrong.png a.mp4',
            '--dump, --show, --images and --val-list measure a set; leave out the files',
        ),
        ('--timeline', '--timeline and --csv classify files; name some'),
        ('--dump a --features a', 'a: two outputs of one name'),
        ('--crops 1 --ckpt diverged.pth', 'the network gives scores that are not numbers, computing in fp32'),
        ('data/demo/images_val/dots_000.jpg --ckpt diverged.pth', 'scores that are not numbers'),
    ],
)
def test_bad_input_gets_one_line(broken, fails, arguments, message):
    line = arguments if '--ckpt' in arguments else f'--ckpt small.pth {arguments}'
    usage = any(flag in line for flag in ('--clips', 'a.mp4', 'timeline'))
    assert message in fails(evaluate.main, line, code=2 if usage else 1)


def recipe(name):
    return DOCS.split(f'<!-- {name} -->\n```python\n')[1].split('```')[0]


def test_the_plot_is_of_the_logged_losses():
    plt = mock.Mock()
    with mock.patch.dict('sys.modules', {'matplotlib': mock.Mock(pyplot=plt), 'matplotlib.pyplot': plt}):
        exec(recipe('plot'), {'open': lambda path: ['{"loss": 2.5}', '{"mode": "val"}']})
    assert plt.mock_calls == [mock.call.plot([2.5]), mock.call.savefig('loss.png')]


def test_a_notebook_names_a_clip_as_evaluate_does(demo, network, capsys):
    code, path = recipe('notebook').replace('work_dirs/demo/latest.pth', f'{demo}/small.pth'), demo / '80.mp4'
    exec(code, {'clip': decode_all(write_video(path, 70, size=(80, 80)))[data.sample_frames(70)[0]]})
    view = data.VideoDataset(None, 'test', 56, num_clips=1, num_crops=1).load(str(path), None)
    scores = evaluate.score_views(network, 'video', view, 'fp32')[0]
    assert capsys.readouterr().out == f'{evaluate.likeliest(scores, names_of(demo, "video"), 5)}\n'


def test_the_probe_tells_what_is_told_apart_by_direction(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, count in (('train', 60), ('val', 30)):
        labels = np.arange(count) % 3
        features = (np.eye(8)[labels] + 0.1 * rng.normal(size=(count, 8))).astype(np.float32)
        truth = labels if name == 'train' else np.where(labels == 2, 0, labels)  # a third will be wrong
        np.savez(f'{name}.npz', features=features, labels=truth)
    exec(recipe('probe'), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ['nearest neighbour tensor(0.6667)', 'logistic regression tensor(0.6667)']


def test_grad_cam_lights_up_what_speaks_for_a_class(demo, network, monkeypatch):
    """With an untrained network, too."""
    monkeypatch.chdir(demo)
    exec(recipe('grad-cam').replace('work_dirs/demo/latest.pth', 'small.pth'), {})
    drawn = np.asarray(PIL.Image.open('cam.png'))
    assert 0 < drawn.max() and drawn.std() > 1
