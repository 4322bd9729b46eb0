"""The schedule, the demo's run from end to end, several processes, and mistakes of the user."""

import copy
import json
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DOCS, SMALL, run

import data
import evaluate
import train
from model import OmniSlowOnly
from runtime import distributed, sources
from runtime.distributed import join
from runtime.log import Log, say_cpu_cost

REFERENCE = Path(__file__).parent / 'reference'
QUICK = f'{SMALL} --workers 1 --videos-per-gpu 8 --images-per-gpu 8'


@pytest.mark.quick
def test_learning_rate_equals_the_reference():
    expected = json.loads((REFERENCE / 'lr.json').read_text())
    recipe, small = expected['recipe'], expected['small']
    for step, rate in zip(recipe['iteration'], recipe['lr'], strict=True):
        assert train.learning_rate(step, recipe['iters_per_epoch']) == pytest.approx(rate, rel=1e-9)
    for step, rate in enumerate(small['lr']):
        assert train.learning_rate(step, 3, 0.1, 2, 6) == pytest.approx(rate, rel=1e-9)


def test_the_defaults_are_the_published_recipe():
    args = train.parse_args([])
    assert (args.epochs, args.warmup_epochs, args.videos_per_gpu, args.lr) == (256, 34, 16, 0.1)
    assert (args.momentum, args.weight_decay, args.clip_norm) == (0.9, 1e-4, 40)
    assert (args.clip_len, args.frame_interval, args.size, args.layers, args.width) == (
        8,
        8,
        224,
        [3, 4, 6, 3],
        64,
    )
    assert (args.val_interval, args.save_minutes) == (4, 10)


@pytest.fixture(scope='module')
def trained(demo):
    """A short run of the demo; gives its folder and what it printed."""
    line = 'train.py --demo --width 8 --size 28 --clip-len 2 --workers 1 --images-per-gpu 8'
    return demo, run(f'{line} --epochs 5 --log-interval 2', demo).stdout


@pytest.mark.quick
def test_demo_trains_validates_and_tests(trained):
    folder, output = trained
    assert 'reusing the set' in output
    assert (
        '32 videos of 8 classes: stripes rising (4), ' in output and 'an epoch sees 32 videos, 1 t' in output
    )
    assert '16 videos of 8 classes, 10 clips x 3 crops' in output
    assert '12 images of 4 classes, centre crop' in output
    assert '\nevaluate.py --ckpt work_dirs/demo/latest.pth  (30 views of each video; ' in output
    assert 'image_top1' in output and 'image_top5' not in output and 'video_top5' in output  # of four classes
    own, last = output.strip().splitlines()[-2:]
    assert last == 'Next: python evaluate.py --ckpt work_dirs/demo/latest.pth --dump result.pkl'
    result = run(last.removeprefix('Next: python '), folder)
    assert '16 videos of 8 classes, 10 clips x 3 crops' in result.stdout and (folder / 'result.pkl').exists()
    own, comment = own.removeprefix('Next: python ').split('  # ')
    assert '.mp4 (video)' in run(own, folder).stdout and comment == 'or YOUR.mp4'
    assert '12 images' in run('evaluate.py --ckpt work_dirs/demo/best.pth --images', folder).stdout


@pytest.mark.quick
def test_work_folder(trained):
    folder = trained[0] / 'work_dirs/demo'
    assert {p.name for p in folder.glob('*.pth')} == {'epoch_4.pth', 'epoch_5.pth', 'best.pth', 'latest.pth'}
    records = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    steps = [r for r in records if 'step' in r]
    assert [(r['epoch'], r['step']) for r in steps] == [(e, 2) for e in range(1, 6)]
    assert all(np.isfinite(r['loss']) and r['time'] >= r['data_time'] >= 0 for r in steps)
    keys = {
        'epoch',
        'step',
        'lr',
        'loss',
        'video_loss',
        'image_loss',
        'video_top1',
        'image_top1',
        'grad_norm',
    }
    assert keys < set(steps[0])
    assert [r['epoch'] for r in records if r.get('mode') == 'val'] == [4, 5]
    checkpoint = torch.load(folder / 'latest.pth', weights_only=True)
    assert checkpoint['epoch'] == 5 and checkpoint['settings']['val_list'] == 'data/demo/video_val.txt'


def test_the_last_three_checkpoints_are_kept(demo):
    options = '--val-interval 1 --no-validate --auto-scale-lr --lr 0.1 --no-flip'
    output = run(f'train.py {QUICK} --epochs 5 {options} --work-dir kept', demo).stdout
    assert 'learning rate 0.00625' in output  # for 8 videos a step
    names = {p.name for p in (demo / 'kept').glob('*.pth')}
    assert names == {'epoch_3.pth', 'epoch_4.pth', 'epoch_5.pth', 'latest.pth'}
    assert '10 steps are few for a network that learns from nothing; --epochs 150 makes 300' in output


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_mixed_precision(demo, precision):
    line = f'train.py {QUICK} --clip-len 2 --images-per-gpu 4 --epochs 1 --no-validate'
    output = run(f'{line} --precision {precision} --work-dir {precision}', demo).stdout
    assert f'{precision} (as asked)' in output and 'epoch 1/1 step 2/2' in output


def test_fine_tuning_takes_all_but_the_heads_that_differ(trained):
    folder = trained[0]
    lines = [line.rsplit(' ', 1) for line in (folder / 'data/demo/video_train.txt').read_text().splitlines()]
    (folder / 'three.txt').write_text(''.join(f'{path} {int(label) % 3}\n' for path, label in lines))
    (folder / 'three names.txt').write_text('one\ntwo\nthree\n')
    line = f'train.py {QUICK} --video-list three.txt --work-dir tuned --epochs 1 --lr 1e-30 --no-validate'
    command = [*line.split(), '--video-labels', 'three names.txt', '--init', 'work_dirs/demo/latest.pth']
    output = run(command, folder).stdout
    assert 'starting from work_dirs/demo/latest.pth, with a new head for videos' in output
    before, after = (
        torch.load(folder / f'{name}/latest.pth', weights_only=True) for name in ('work_dirs/demo', 'tuned')
    )
    assert after['video_labels'] == ['one', 'two', 'three'] and after['model']['video_head.4.bias'].shape == (
        3,
    )
    for key in ('conv1.weight', 'layer4.0.conv1.weight', 'image_head.2.weight'):
        assert torch.equal(before['model'][key], after['model'][key])
    names = (folder / 'data/demo/video_labels.txt').read_text().splitlines()
    (folder / 'reversed.txt').write_text('\n'.join(names[::-1]))
    line = f'train.py {QUICK} --video-labels reversed.txt --work-dir reversed --epochs 1 --no-validate'
    output = run(f'{line} --init work_dirs/demo/latest.pth', folder).stdout
    assert 'starting from work_dirs/demo/latest.pth, with a new head for videos\n' in output
    line = '2 steps are few for a new head (video), which learns from nothing; --epochs 150 makes 300'
    assert line in output
    line = 'train.py --demo --init work_dirs/demo/latest.pth --work-dir wide --epochs 1 --workers 1'
    result = run(f'{line} --width 24', folder, expect=1)
    assert 'work_dirs/demo/latest.pth: weight conv1.weight is (8, 3, 7, 7)' in result.stderr
    assert result.stderr.endswith('; it needs --width 8 --layers 1 1 1 1\n')
    for _ in range(2):  # the size is read off the file, and again where the line starts a run anew
        assert 'are few' not in run(f'{line} --no-validate --resume', folder).stdout
    settings = torch.load(folder / 'wide/latest.pth', weights_only=True)['settings']
    assert (settings['width'], settings['layers']) == (8, [1, 1, 1, 1])


def test_tensorboard_gets_the_numbers_of_the_log(trained):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    events = accumulator.EventAccumulator(str(trained[0] / 'work_dirs/demo')).Reload()
    records = [
        json.loads(line) for line in (trained[0] / 'work_dirs/demo/log.jsonl').read_text().splitlines()
    ]
    losses = [record['video_loss'] for record in records if 'step' in record]
    assert [event.value for event in events.Scalars('train/video_loss')] == pytest.approx(losses, rel=1e-5)
    assert [event.step for event in events.Scalars('val/video_top1')] == [8, 10]


def test_videos_alone_from_class_folders(demo):
    for line in (demo / 'few.txt').read_text().splitlines():
        name, label = line.split()
        (demo / f'folders/class {int(label) % 3}').mkdir(parents=True, exist_ok=True)
        (demo / f'folders/class {int(label) % 3}/{name}').symlink_to(demo / f'data/demo/videos_train/{name}')
    options = '--video-only --no-validate --work-dir video --video-list folders --val-list folders'
    line = f'train.py {QUICK} --epochs 1 {options}'
    output = run([*line.split(), '--video-labels', ''], demo).stdout
    assert '16 videos of 3 classes' in output and 'image' not in output.split('epoch 1/1')[1]
    checkpoint = torch.load(demo / 'video/latest.pth', weights_only=True)
    assert checkpoint['video_labels'] == ['class 0', 'class 1', 'class 2']
    assert not any(key.startswith('image_head') for key in checkpoint['model'])
    output = run('evaluate.py --ckpt video/latest.pth --clips 1 --crops 1', demo).stdout
    assert '16 videos' in output and 'taken for class' in output
    result = run('evaluate.py --ckpt video/latest.pth --images', demo, expect=1)
    assert 'no head for images' in result.stderr


def test_images_first_then_videos(demo):
    """An image-only run, and a run that starts from its weights."""
    run(f'train.py {QUICK} --epochs 2 --image-only --work-dir images', demo)
    saved = torch.load(demo / 'images/best.pth', weights_only=True)
    assert 'video_labels' not in saved and len(saved['image_labels']) == 4
    state = saved['model']
    assert not any(key.startswith('video_head') for key in state)
    assert torch.equal(state['bn1.running_mean'], torch.zeros(8))
    assert (
        '12 images of 4 classes, centre crop'
        in run('evaluate.py --ckpt images/best.pth --images', demo).stdout
    )
    records = [json.loads(line) for line in (demo / 'images/log.jsonl').read_text().splitlines()]
    assert (records[0]['epoch'], records[0]['step']) == (1, 5) and 'video_loss' not in records[0]

    line = f'train.py {QUICK} --epochs 1 --lr 1e-30 --no-validate --video-only --work-dir then_videos'
    run(f'{line} --init-2d images/best.pth', demo)
    started = torch.load(demo / 'then_videos/latest.pth', weights_only=True)['model']
    for key in ('conv1.weight', 'layer4.0.conv1.weight'):
        assert torch.equal(started[key], state[key])
    given = state['layer3.0.bn2.image_running_var']
    assert torch.equal(started['layer3.0.bn2.image_running_var'], given)  # no image has come since
    assert not torch.isclose(started['layer3.0.bn2.running_var'], given).any()  # of the videos alone


def test_images_first_then_jointly(demo, tmp_path):
    """The README's two lines, each twice; the second goes on from all that images have taught."""
    for name in ('data', 'few.txt'):
        (tmp_path / name).symlink_to(demo / name)
    lines = DOCS.split('<!-- images first -->\n```\n')[1].split('\n```')[0].splitlines()
    for line in lines:
        flags = f'{QUICK} --epochs 1 --lr 1e-30 --no-validate {line.split("train.py ")[1]}'
        output = [run(f'train.py {flags}', tmp_path).stdout for _ in range(2)]
        assert 'starting afresh' in output[0] and 'resuming from' in output[1]
    images, both = (torch.load(path, weights_only=True)['model'] for path in tmp_path.glob('*/*/latest.pth'))
    if 'video_head.0.weight' in images:
        images, both = both, images
    assert 'video_head.0.weight' in both
    learned = [key for key in images if 'running' not in key and 'num_batches' not in key]
    assert 'image_head.2.weight' in learned
    assert all(torch.allclose(both[key], images[key], rtol=0, atol=1e-9) for key in learned)


def test_two_processes(demo):
    """Both ranks end with the same weights, and together draw what the sampler says."""
    code = """
import data, json, os, torch, train
paths, collate = [], data.collate
def recording(samples):
    paths.append([sample.path for _, sample in samples])
    return collate(samples)
data.collate = recording
network = train.main()
rank = os.environ['RANK']
torch.save(network.state_dict(), f'rank{rank}.pth')
json.dump(paths, open(f'rank{rank}.json', 'w'))
"""
    options = '--epochs 2 --workers 0 --videos-per-gpu 4 --images-per-gpu 5 --seed 3'
    run(['-c', code, *f'{SMALL} {options}'.split()], demo, ranks=2)
    ranks = [torch.load(demo / f'rank{rank}.pth', weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])

    lists = [(demo / name).read_text().split('\n') for name in ('few.txt', 'data/demo/image_train.txt')]
    for rank in (0, 1):
        drawn = json.loads((demo / f'rank{rank}.json').read_text())
        sampler = data.JointSampler({'video': 16, 'image': 40}, {'video': 4, 'image': 5}, 2, seed=3)
        expected = [
            [lists[source == 'image'][index].rsplit(' ', 1)[0] for source, _, index in sampler.batch(s, rank)]
            for s in range(4)
        ]
        assert [[Path(path).name for path in batch] for batch in drawn] == expected


def test_a_step_of_the_full_network_on_a_cpu_is_announced(demo, monkeypatch, capsys):
    monkeypatch.chdir(demo)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    lists = ''
    for source in ('video', 'image'):
        lists += f'--{source}-list data/demo/{source}_train.txt --{source}-root data/demo/{source}s_train '
    for options, expected in (
        ('', 'a step takes about 128 seconds and 21 GB: --width 16 --size 112, or smaller'),
        ('--accumulate 2 --freeze --init a.pth --width 64 --layers 3 4 6 3', 'about 85 seconds and 2 GB'),
        ('--width 16 --size 112', ''),
        ('--videos-per-gpu 2 --images-per-gpu 2 --size 112', ''),
    ):
        args = train.parse_args((lists + options).split())
        opened = sources.open_sources(args)
        capsys.readouterr()
        say_cpu_cost(args, opened, 'cpu')
        output = capsys.readouterr().out
        assert expected in output and bool(expected) == bool(output)


def test_an_unreadable_file_does_not_end_the_run(demo):
    lines = (demo / 'few.txt').read_text().splitlines()
    name = 'torn file \udcff.mp4'  # not UTF-8
    (demo / 'data/demo/videos_train' / name).write_bytes(b'\0' * 1000)
    text = '\r\n'.join([*lines, '', f'{name} 3  '])
    (demo / 'torn.txt').write_text(text, errors='surrogateescape')
    output = run(f'train.py {QUICK} --epochs 3 --video-list torn.txt --work-dir torn', demo).stdout
    assert '1 unreadable samples were replaced, see torn/bad_samples.txt' in output
    listed = (demo / 'torn/bad_samples.txt').read_text(errors='surrogateescape').splitlines()
    assert all(line.startswith(f'data/demo/videos_train/{name}: ') for line in listed) and listed


def test_too_many_unreadable_files_end_the_run(demo):
    lines = (demo / 'data/demo/video_train.txt').read_text().splitlines()
    (demo / 'data/demo/videos_train/zeros.mp4').write_bytes(b'\0' * 1000)
    (demo / 'many.txt').write_text('\n'.join([*lines, *['zeros.mp4 3'] * 60]))
    result = run(f'train.py {QUICK} --epochs 3 --video-list many.txt --work-dir many', demo, expect=1)
    assert re.search(
        r'\d+ of the \d+ samples .* unreadable, more than --max-bad 0.01 allows; .* many/bad_samples.txt',
        result.stderr,
    )
    assert 'Traceback' not in result.stderr


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights(demo):
    run(f'train.py {QUICK} --epochs 1 --work-dir broken', demo)
    before = torch.load(demo / 'broken/latest.pth', weights_only=True)
    result = run(f'train.py {QUICK} --epochs 9 --work-dir broken --lr 1e38 --resume', demo, expect=1)
    assert 'changed since the checkpoint: lr 0.05 -> 1e+38' in result.stdout
    assert re.search(
        r'loss is not finite in epoch 2 step \d, rank 0; .* its \d+ files:\n  data/demo/videos_train',
        result.stderr,
    )
    assert 'Traceback' not in result.stderr
    after = torch.load(demo / 'broken/latest.pth', weights_only=True)
    assert all(torch.equal(after['model'][key], value) for key, value in before['model'].items())


def test_the_fused_step_leaves_weights_alone_where_told():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], 0.1, 0.9, weight_decay=0.1, fused=True)
    weight.grad = torch.full((3,), float('nan'))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('', 'data/kinetics400/kinetics400_train_list_videos.txt: no such list.*--video-list.*--demo'),
        ('--demo --video-root nowhere', 'nowhere/.*: no such file, .* --video-root names the folder'),
        ('--demo --val-list bad_label.txt', 'bad_label.txt:2: label 8 is out of range, 0 to 7'),
        ('--demo --video-list gone.txt', 'gone.mp4: no such file, nor any other at the start of gone.txt'),
        ('--demo --videos-per-gpu 33', '32 training videos are too few .* 33; lower --videos-per-gpu'),
        ('--demo --image-val-list typo.txt', r'typo.txt: no such list or .* \(--image-val-list\)'),
        ('--demo --video-labels typo.txt', 'typo.txt: no such file, given by --video-labels'),
        ('--demo --image-val-root typo', 'typo/.*: no such file, .* --image-val-root names the folder'),
        ('--demo --image-list one_class.txt', 'one_class.txt: all 2 images are of one class'),
        ('--demo --image-labels= --image-list huge.txt', 'huge.txt:2: label 1000000 among 2 samples'),
        ('--demo --resume small_text.pth', 'small_text.pth: not a checkpoint'),
        ('--demo --resume other.pth', 'other.pth: weights, but no run to resume; --init'),
        ('--demo --init-2d other.pth', 'other.pth: weight conv1.weight is'),
        ('--demo --freeze --resume', '--freeze needs trained weights: name them with --init or --init-2d'),
        ('--demo --work-dir empty.txt/work', 'empty.txt'),
        ('--demo --epochs 0', "'0' is not a whole number"),
        ('--demo --lr nan', "'nan' is not a number above 0"),
        ('--demo --videos-per-gpu 1', '--videos-per-gpu: a batch of 1 cannot be normalized'),
        ('--demo --size 100', 'multiple of 7'),
        ('--demo --video-only --image-only', '--image-only leaves no videos'),
        ('--demo --epochs 3 --warmup-epochs 4', '--warmup-epochs 4 is more than --epochs 3'),
        ('--demo --momentum 5 --lr 1', "'5' is not a number of at least 0, below 1"),
        ('--demo --lr 1 --work-dir=', '--work-dir must not be empty'),
        ('--demo --lr 1 --epoks 3', 'unrecognized arguments: --epoks 3; did you mean --epochs\\?'),
        (
            '--lr 1 --video-list data --video-root data',
            '--video-list is a folder of class folders, --video-root is for',
        ),
    ],
)
def test_bad_input_gets_one_line(demo, fails, arguments, message):
    (demo / 'empty.txt').write_text('\n\n')
    (demo / 'bad_label.txt').write_text('a.mp4 1\nb.mp4 8\n')
    (demo / 'gone.txt').write_text('gone.mp4 1\n')
    (demo / 'one_class.txt').write_text('stripes_000.jpg 0\nstripes_001.jpg 0\n')
    (demo / 'huge.txt').write_text('stripes_000.jpg 0\nstripes_001.jpg 1000000\n')
    (demo / 'small_text.pth').write_text('hello')
    state = {'model': {'conv1.weight': torch.zeros(3)}, 'optimizer': {}}
    torch.save(state, demo / 'other.pth')
    flags = ('epochs', 'lr', 'momentum', '--size', 'only')
    usage = any(flag in arguments for flag in flags)
    work_dir = '' if 'work-dir' in arguments else '--work-dir mistakes'
    assert re.search(message, fails(train.main, f'{arguments} {work_dir}', code=2 if usage else 1))


def test_own_lists_are_not_paired_with_the_published_validation_sets(demo):
    own = '--video-list data/demo/video_train.txt --image-list mine --image-root data/demo/images_train'
    args = train.parse_args(own.split())
    assert (args.val_list, args.image_val_list) == (None, None)
    args = train.parse_args([])
    assert args.val_list == evaluate.VAL_LIST and args.image_val_list is None  # it does not exist here
    args = train.parse_args([*own.split(), '--val-list', 'a.txt', '--image-val-list', 'b.txt'])
    assert (args.val_list, args.image_val_list) == ('a.txt', 'b.txt')


def test_more_processes_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    with pytest.raises(SystemExit, match='train.py: 2 processes for the 1 GPUs here: --nproc_per_node=1'):
        join('train.py')


def test_the_log_is_json_whatever_the_numbers(tmp_path):
    log = Log(str(tmp_path), torch.device('cpu'))
    log.write({'step': 3, 'grad_norm': float('inf'), 'loss': float('nan')}, 'train')
    assert (tmp_path / 'log.jsonl').read_text() == '{"step": 3, "grad_norm": null, "loss": null}\n'


def test_a_run_is_not_overwritten_unasked(demo, fails):
    (demo / 'taken').mkdir()
    (demo / 'taken/latest.pth').touch()
    lists = ' '.join(
        f'--{k}-list data/demo/{v}_train.txt --{k}-root data/demo/{v}s_train'
        for k, v in (('video', 'video'), ('image', 'image'), ('val', 'video'))
    )
    assert 'taken: no checkpoint in it can be resumed' in fails(train.main, f'{lists} --work-dir taken')


def test_the_recipes_do_what_they_say():
    """Each piece of code, as it stands in the docs, with what surrounds it where it is to be put."""
    code = DOCS.split('<!-- recipes -->\n```python\n')[1].split('```')[0]
    weights, features, jitter, smoothing, mixup, ema, balance, plot = re.split(r'\n\n(?=# )', code.strip())
    labels = {source: torch.tensor([0, 1, 2, 2, 1, 0]) for source in ('video', 'image')}
    logits = {source: torch.randn(6, 3) for source in labels}
    space = {'F': F, 'batch': labels, 'logits': logits, 'labels': labels, 'torch': torch}
    space['class_weights'] = torch.tensor([1.0, 0.0, 0.0])
    exec(weights, space)
    first = F.cross_entropy(logits['video'][[0, 5]], labels['video'][[0, 5]])
    torch.testing.assert_close(space['losses']['video'], first)
    torch.testing.assert_close(space['losses']['image'], F.cross_entropy(logits['image'], labels['image']))
    exec(smoothing, space)
    hard, even = -logits['video'].log_softmax(1)[range(6), labels['video']], -logits['video'].log_softmax(1)
    torch.testing.assert_close(space['losses']['video'], 0.9 * hard.mean() + 0.1 * even.mean())

    clips = torch.randint(0, 256, (6, 3, 2, 4, 4), dtype=torch.uint8)
    before, after = mixup.split('# and after')
    exec(before, space | (given := {'pixels': {'video': clips}}), given)
    share, mixed = given['share'], given['pixels']['video']
    assert 0.5 <= share <= 1
    torch.testing.assert_close(mixed[0], share * clips[0].float() + (1 - share) * clips[5].float())
    plain = {source: F.cross_entropy(logits[source], labels[source]) for source in labels}
    exec(f'#{after}', space | {'losses': plain, 'share': share})
    target = share * F.one_hot(labels['video'], 3) + (1 - share) * F.one_hot(labels['video'], 3).flip(0)
    torch.testing.assert_close(plain['video'], F.cross_entropy(logits['video'], target))

    network = OmniSlowOnly(3, 3, (1, 1, 1, 1), 8)
    exec(features, space := {'network': network, 'clips': clips})
    assert space['features'].shape == (6, 32 * 8)
    exec(ema, {'torch': torch, 'network': network, 'state': (state := {})})
    assert state['average'].keys() == network.state_dict().keys()
    space = {'frames': torch.full((3, 8, 8), 200, dtype=torch.uint8), 'rng': data.generator('test', 1)}
    exec(jitter, {'torch': torch}, space)
    assert space['frames'].dtype == torch.uint8 and 120 <= space['frames'].unique().item() <= 255
    assert compile(plot, 'plot', 'exec')

    files = data.FileList(np.arange(90).astype('S'), np.repeat([0, 1], [81, 9]))  # 9 and 3 of 12
    source, sampler = mock.Mock(train=mock.Mock(files=files)), data.JointSampler({'video': 90}, {'video': 9})
    source.name = 'video'
    shares, drawing = balance.split('# and in')
    drawing, adding = drawing.split('# and repl')
    exec(shares, {'np': np, 'sources': [source], 'sampler': sampler})
    orders = []
    for passes in (*range(50), 0):
        space = {'self': sampler, 'source': 'video', 'passes': passes, 'generator': data.generator}
        exec(f'#{drawing}', space)
        orders.append(space['order'])
    assert np.mean(files.labels[orders[:50]] == 0) == pytest.approx(0.75, abs=0.02)
    assert (orders[0] == orders[50]).all() and (orders[0] != orders[1]).any()
    sampler.orders, keys = {'video': (3, orders[3])}, []
    for place in range(90):
        exec(f'#{adding}', {'self': sampler, 'source': 'video', 'passes': 3, 'place': place, 'keys': keys})
    assert len(set(keys)) == 90 > len({index for _, _, index in keys})


@pytest.mark.parametrize('accumulate', [1, 2])
def test_statistics_of_the_first_steps_are_averaged_evenly(demo, accumulate):
    """Those of the first layer by hand, over a run whose weights stand still."""
    options = f'--epochs 1 --lr 1e-30 --videos-per-gpu 4 --images-per-gpu 5 --accumulate {accumulate}'
    folder = f'even{accumulate}'
    run(f'train.py {SMALL} --workers 1 {options} --no-validate --work-dir {folder}', demo)
    saved = torch.load(demo / f'{folder}/latest.pth', weights_only=True)['model']
    torch.manual_seed(0)
    network = OmniSlowOnly(8, 4, (1, 1, 1, 1), 8)
    root = f'{demo}/data/demo'
    videos = sources.read_list(f'{demo}/few.txt', f'{root}/videos_train', videos=True)
    images = sources.read_list(f'{root}/image_train.txt', f'{root}/images_train')
    joint = data.JointDataset(
        {
            'video': data.VideoDataset(videos, clip_len=4, frame_interval=2, size=28),
            'image': data.ImageDataset(images, size=28),
        }
    )
    sampler = data.JointSampler({'video': 16, 'image': 40}, {'video': 4, 'image': 5}, accumulate)
    means, variances = {'video': [], 'image': []}, {'video': [], 'image': []}
    for keys in (sampler.batch(s, n) for s in range(4 // accumulate) for n in range(accumulate)):
        for source, item in data.collate([joint[key] for key in keys]).items():
            x = item.pixels.float()
            x = x.transpose(1, 2).flatten(0, 1) if source == 'video' else x
            with torch.no_grad():
                x = network.conv1((x - network.mean) / network.std)
            means[source].append(x.mean((0, 2, 3)))
            variances[source].append(x.transpose(0, 1).flatten(1).var(1))
    assert len(means['video']) == 4
    for source, prefix in (('video', ''), ('image', 'image_')):
        for name, values in (('mean', means), ('var', variances)):
            expected = torch.stack(values[source]).mean(0)
            ours = saved[f'bn1.{prefix}running_{name}']
            torch.testing.assert_close(ours, expected, rtol=0.01, atol=0.005)


def test_nothing_is_mirrored_where_told(demo):
    samples = sources.read_list(f'{demo}/data/demo/image_train.txt', f'{demo}/data/demo/images_train')
    either, straight = data.ImageDataset(samples, size=56), data.ImageDataset(samples, size=56, flip=False)
    pairs = [(either[0, i].pixels, straight[0, i].pixels) for i in range(12)]
    same = [torch.equal(a, b) for a, b in pairs]
    assert any(same) and not all(same)  # the crops are alike, and some are mirrored
    assert all(torch.equal(a, b if alike else b.flip(-1)) for (a, b), alike in zip(pairs, same))


def test_the_readme_s_fine_tuning_keeps_what_was_learned(trained):
    """The line as it stands there, on class folders of the demo's files."""
    folder = trained[0]
    for source, name in (('video', 'my_videos'), ('image', 'my_images')):
        for split, mine in (('train', name), ('val', f'{name}_val')):
            lines = (folder / f'data/demo/{source}_{split}.txt').read_text().splitlines()
            for line in lines[:16] if source == 'video' else lines:
                file, label = line.split()
                target = folder / mine / label / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(folder / f'data/demo/{source}s_{split}' / file)
    line = DOCS.split('<!-- fine-tune -->\n```\n')[1].split('\n```')[0]
    line = line.replace('\\\n', ' ').replace('python ', '').replace('work_dirs/omni', 'work_dirs/demo')
    output = run(
        f'{line} --layers 1 1 1 1 --width 8 --size 28 --clip-len 2 --workers 1 --log-interval 1', folder
    ).stdout
    assert 'with a new head for images and videos' in output and 'times the recipe' not in output
    records = [json.loads(line) for line in (folder / 'work_dirs/mine/log.jsonl').read_text().splitlines()]
    losses = [record['loss'] for record in records if 'step' in record]
    assert len(losses) == 20 and max(losses) < 1.3 * losses[0] and losses[-1] < losses[0]
    hasty = (
        line.replace('0.00125', '0.1').replace('work_dirs/mine', 'hasty').replace('--epochs 20', '--epochs 3')
    )
    output = run(
        f'{hasty} --layers 1 1 1 1 --width 8 --size 28 --clip-len 2 --workers 1 --no-validate', folder
    ).stdout
    assert "the learning rate is 8.0 times the recipe's for so many videos a step; --auto-scale-lr" in output
    assert 'an epoch sees 85 images, 2.12 times the set' in output


def test_the_readme_s_step_is_the_program_s():
    """Two steps, in which clipping, momentum and weight decay tell."""
    code = re.search('```python\n(pixels = .*?)```', DOCS, re.S)[1].replace(', 40)', ', 0.5)')
    torch.manual_seed(0)
    ours = OmniSlowOnly(3, 3, (1, 1, 1, 1), 4)
    network = copy.deepcopy(ours)
    clips, images = (torch.randint(256, (4, 3, *size), dtype=torch.uint8) for size in ((2, 32, 32), (32, 32)))
    labels = {'video': torch.tensor([0, 1, 2, 2]), 'image': torch.tensor([2, 1, 0, 0])}
    batch = {s: data.Batch(x, labels[s], [], []) for s, x in (('video', clips), ('image', images))}
    optimizer = train.make_optimizer(ours, 0.1, 0.9, 0.2)
    plain = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=0.2)
    space = {'F': F, 'nn': torch.nn, 'network': network, 'optimizer': plain, 'labels': labels}
    device, scaler = torch.device('cpu'), torch.amp.GradScaler('cpu', enabled=False)
    for seed in (1, 2):
        train.train_step(ours, optimizer, scaler, [batch], [seed], device, clip_norm=0.5)
        torch.manual_seed(seed)
        exec(code, space | {'clips': clips, 'images': images})
    for key, value in network.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


def test_each_step_has_its_rate_and_dropout_and_the_best_epoch_is_kept(demo, monkeypatch):
    """The loop itself, with steps that change nothing."""
    rates, seeds, others, top1 = [], [], [], iter((0.5, 0.75, 0.25))

    def step(network, optimizer, scaler, batches, own_seeds, *options):
        rates.append(optimizer.param_groups[0]['lr'])
        seeds.extend(own_seeds)
        others.append(options[2:])
        keys = [f'{source}_{key}' for source in batches[0] for key in ('loss', 'top1')]
        return [dict.fromkeys(keys, torch.ones(()))] * len(batches), torch.ones(())

    monkeypatch.setattr(train, 'train_step', step)
    monkeypatch.setattr(train, 'validate', lambda *_: {'video_top1': next(top1)})
    monkeypatch.setattr(Log, 'open_board', lambda *_: None)
    monkeypatch.chdir(demo)
    options = (
        '--width 4 --size 28 --clip-len 2 --videos-per-gpu 8 --images-per-gpu 2 --accumulate 2 --epochs 3'
    )
    line = f'--demo {options} --val-interval 1 --warmup-epochs 1 --workers 0 --work-dir looped'
    with distributed.processes('train.py') as device:
        train.train(train.parse_args(line.split()), device)
    assert rates == [train.learning_rate(number, 2, 0.05, 1, 3) for number in range(6)]
    assert others == [(1.0, 2 * number) for number in range(6)]  # the norm to clip at, batches seen
    assert len(set(seeds)) == len(seeds) == 12
    best, latest = (torch.load(f'looped/{name}.pth', weights_only=True) for name in ('best', 'latest'))
    assert best['epoch'] == 2 and latest['epoch'] == 3 and latest['best'][0] == best['best'][0] == 0.75


def test_a_line_of_the_log_has_the_means_of_all_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, 'average', lambda tensors: [tensor.add_(1) for tensor in tensors])
    monkeypatch.setattr(Log, 'open_board', lambda *_: None)
    log = Log(str(tmp_path), torch.device('cpu'))
    log.begin(0, 1, 0, 2)
    for loss in (1.0, 2.0):
        log.add([], [{'video_loss': torch.tensor(loss), 'video_top1': torch.tensor(0.5)}], torch.ones(()))
    log.line(0.1, 0)
    record = json.loads((tmp_path / 'log.jsonl').read_text())
    assert (record['video_loss'], record['video_top1'], record['loss']) == (2.5, 1.5, 2.5)
