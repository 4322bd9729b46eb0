"""The schedule, the demo's run from end to end, several processes, and mistakes of the user."""

import copy
import json
import re
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DOCS, ROOT, SMALL, checkpoint_in, records, run

import data
import evaluate
import train
from model import OmniSlowOnly
from runtime import distributed, sources
from runtime.distributed import join
from runtime.log import Log, introduce

QUICK = f'train.py {SMALL} --workers 1 --videos-per-gpu 8 --images-per-gpu 8'
TRAINED = 'train.py --demo --width 8 --size 28 --clip-len 2 --workers 1 --images-per-gpu 8'


@pytest.mark.quick
def test_learning_rate_equals_the_reference():
    expected = json.loads((ROOT / 'tests/reference/lr.json').read_text())
    recipe, small = expected['recipe'], expected['small']
    for step, rate in zip(recipe['iteration'], recipe['lr'], strict=True):
        assert train.learning_rate(step, recipe['iters_per_epoch']) == pytest.approx(rate, rel=1e-9)
    for step, rate in enumerate(small['lr']):
        assert train.learning_rate(step, 3, 0.1, 2, 6) == pytest.approx(rate, rel=1e-9)


def test_the_defaults_are_the_published_recipe():
    args = train.parse_args([])
    assert (args.epochs, args.warmup_epochs, args.videos_per_gpu, args.lr) == (256, 34, 16, 0.1)
    assert (args.momentum, args.weight_decay, args.clip_norm) == (0.9, 1e-4, 40)
    assert (args.clip_len, args.frame_interval, args.size) == (8, 8, 224)
    assert (args.layers, args.width, args.val_interval, args.save_minutes) == ([3, 4, 6, 3], 64, 4, 10)


def class_folders(demo, list_file, files, target, prefix=''):
    """Make a folder of class folders from a list."""
    for line in (demo / list_file).read_text().splitlines():
        name, label = line.split()
        folder = demo / target / f'{prefix}{label}'
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(demo / 'data/demo' / files / name)


@pytest.fixture(scope='module')
def trained(demo):
    """A short run of the demo; gives its folder and what it printed."""
    return demo, run(f'{TRAINED} --epochs 5 --log-interval 2', demo).stdout


@pytest.mark.quick
def test_demo_trains_validates_and_tests(trained):
    folder, output = trained
    for line in (
        'reusing the set',
        '32 videos of 8 classes, from stripes rising (4) to ',
        '10 steps are few; --epochs 150 makes 300',
        '16 videos of 8 classes, 10 clips x 3 crops',
        '12 images of 4 classes, centre crop',
        '\nevaluate.py --ckpt work_dirs/demo/latest.pth\n',
    ):
        assert line in output
    assert 'image_top1' in output and 'image_top5' not in output and 'video_top5' in output  # of four classes
    line = output.strip().splitlines()[-1].removeprefix('Next: python ')
    assert '.mp4 (video)' in run(line, folder).stdout


@pytest.mark.quick
def test_work_folder(trained):
    folder = trained[0] / 'work_dirs/demo'
    assert {p.name for p in folder.glob('*.pth')} == {'epoch_4.pth', 'epoch_5.pth', 'best.pth', 'latest.pth'}
    steps = records(folder, 'step')
    assert [(r['epoch'], r['step']) for r in steps] == [(1, 1), *((epoch, 2) for epoch in range(1, 6))]
    assert all(np.isfinite(r['loss']) and r['time'] >= r['data_time'] >= 0 for r in steps)
    keys = 'epoch step lr loss video_loss image_loss video_top1 image_top1 grad_norm'
    assert {*keys.split()} < steps[0].keys()
    assert [r['epoch'] for r in records(folder, 'mode')] == [4, 5]
    checkpoint = checkpoint_in(folder)
    assert checkpoint['epoch'] == 5 and checkpoint['settings']['val_list'] == 'data/demo/video_val.txt'


def test_tensorboard_gets_the_numbers_of_the_log(trained):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    events = accumulator.EventAccumulator(str(trained[0] / 'work_dirs/demo')).Reload()
    losses = [record['video_loss'] for record in records(trained[0] / 'work_dirs/demo', 'step')]
    assert [event.value for event in events.Scalars('train/video_loss')] == pytest.approx(losses, rel=1e-5)
    assert [event.step for event in events.Scalars('val/video_top1')] == [8, 10]


def test_videos_alone_from_class_folders(demo):
    class_folders(demo, 'few.txt', 'videos_train', 'folders', 'class ')
    options = '--video-only --no-validate --video-list folders --val-list folders --video-labels='
    output = run(f'{QUICK} --epochs 1 {options} --work-dir video', demo).stdout
    assert '16 videos of 8 classes' in output and 'image' not in output.split('epoch 1/1')[1]
    checkpoint = checkpoint_in(demo / 'video')
    assert checkpoint['video_labels'] == [f'class {number}' for number in range(8)]
    assert not any(key.startswith('image_head') for key in checkpoint['model'])
    output = run('evaluate.py --ckpt video/latest.pth --clips 1 --crops 1', demo).stdout
    assert '16 videos' in output and 'taken for class' in output
    result = run('evaluate.py --ckpt video/latest.pth --images', demo, expect=1)
    assert 'no head for images' in result.stderr


def test_images_first_then_jointly_or_videos(demo):
    """The README's two lines, each twice, and --init-2d, go on from all that images have taught."""
    options = f'{QUICK} --epochs 1 --lr 1e-30 --work-dir both'
    lines = DOCS.split('<!-- images first -->\n```\n')[1].split('\n```')[0].splitlines()
    said = 'learning rate 1.17647e-32', 'learning rate 1e-30'  # 8 images a step of the recipe's 680
    for line, quick, rate in zip(lines, ('--auto-scale-lr', '--no-validate'), said, strict=True):
        output = [run(f'{options} {quick} {line.split("train.py ")[1]}', demo).stdout for _ in range(2)]
        assert 'starting afresh' in output[0] and 'resuming from' in output[1] and rate in output[0]
    run(f'{options} --no-validate --video-only --work-dir videos --init-2d work_dirs/images/best.pth', demo)
    record = records(demo / 'work_dirs/images', 'step')[-1]
    assert (record['epoch'], record['step']) == (1, 5) and 'video_loss' not in record

    given = checkpoint_in(demo / 'work_dirs/images')
    assert 'video_labels' not in given and len(given['image_labels']) == 4
    given, both, videos = (
        checkpoint_in(demo / name)['model'] for name in ('work_dirs/images', 'both', 'videos')
    )
    assert not any(key.startswith('video_head') for key in given) and 'video_head.0.weight' in both
    assert not given['bn1.running_mean'].any()
    learned = [key for key in given if 'running' not in key and 'num_batches' not in key]
    assert 'image_head.2.weight' in learned
    assert all(torch.allclose(both[key], given[key], rtol=0, atol=1e-9) for key in learned)
    for key in ('conv1.weight', 'layer4.0.conv1.weight'):
        assert torch.equal(videos[key], given[key])
    variance = given['layer3.0.bn2.image_running_var']
    assert torch.equal(videos['layer3.0.bn2.image_running_var'], variance)  # no image has come since
    assert not torch.isclose(videos['layer3.0.bn2.running_var'], variance).any()  # of the videos alone


def test_a_run_says_what_it_is_about_to_do(demo, monkeypatch, capsys):
    monkeypatch.chdir(demo)
    paths = '--{0}-list data/demo/{0}_train.txt --{0}-root data/demo/{0}s_train'
    for options, expected in (
        ('', 'so large a network takes minutes: see "On a small machine" in README.md'),
        ('', "the learning rate is 8.0 times the recipe's for so many videos a step; --auto-scale-lr"),
        ('', 'an epoch sees 170 images, 4.25 times the set'),
        ('--val-list data/demo/video_val.txt --val-root data/demo/videos_val', 'one of them is 6.2 points'),
        ('--width 16', ''),
    ):
        args = train.parse_args(f'{paths.format("video")} {paths.format("image")} {options}'.split())
        opened = sources.open_sources(args)
        per_gpu = {source.name: source.per_gpu for source in opened}
        sampler = data.JointSampler({'video': 32, 'image': 40}, per_gpu, args.accumulate)
        capsys.readouterr()
        introduce(args, opened, sampler, 'cpu', None, 0)
        output = capsys.readouterr().out
        assert expected in output and (args.width == 64) == ('on a CPU' in output)


def test_an_unreadable_file_does_not_end_the_run(demo):
    lines = (demo / 'few.txt').read_text().splitlines()
    name = 'torn file \udcff.mp4'  # not UTF-8
    (demo / 'data/demo/videos_train' / name).write_bytes(b'\0' * 1000)
    text = '\r\n'.join([*lines, '', f'{name} 3  '])
    (demo / 'torn.txt').write_text(text, errors='surrogateescape')
    options = '--epochs 3 --no-validate --video-list torn.txt --work-dir torn --precision bf16'
    output = run(f'{QUICK} {options}', demo).stdout
    assert 'bf16 (as asked)' in output
    assert '1 unreadable samples were replaced, see torn/bad_samples.txt' in output
    listed = (demo / 'torn/bad_samples.txt').read_text(errors='surrogateescape').splitlines()
    assert all(line.startswith(f'data/demo/videos_train/{name}: ') for line in listed) and listed


def test_too_many_unreadable_files_end_the_run(demo):
    lines = (demo / 'data/demo/video_train.txt').read_text().splitlines()
    (demo / 'data/demo/videos_train/zeros.mp4').write_bytes(b'\0' * 1000)
    (demo / 'many.txt').write_text('\n'.join([*lines, *['zeros.mp4 3'] * 60]))
    error = run(f'{QUICK} --epochs 3 --video-list many.txt --work-dir many', demo, expect=1).stderr
    line = r'\d+ of the \d+ samples .* unreadable, more than --max-bad 0.01 allows; .* many/bad_samples.txt'
    assert re.search(line, error) and 'Traceback' not in error


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights(trained):
    folder = trained[0] / 'broken'
    folder.mkdir()
    shutil.copy(trained[0] / 'work_dirs/demo/latest.pth', folder)  # to go on from another run's checkpoint
    before = (folder / 'latest.pth').read_bytes()
    result = run(f'{TRAINED} --epochs 9 --lr 1e38 --resume --work-dir broken', trained[0], expect=1)
    assert 'changed since the checkpoint: lr 0.05 -> 1e+38' in result.stdout
    line = r'loss is not finite in epoch 6, steps \d to \d, rank 0; no checkpoint has it'
    assert re.search(line, result.stderr) and 'Traceback' not in result.stderr
    assert [*folder.glob('*.pth')] == [folder / 'latest.pth']
    assert (folder / 'latest.pth').read_bytes() == before


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('', 'data/kinetics400/kinetics400_train_list_videos.txt: no such list.*--video-list.*--demo'),
        ('--demo --video-root nowhere', 'nowhere/.*: no such file, .* --video-root names the folder'),
        ('--demo --val-list bad_label.txt', 'bad_label.txt:2: label 8 is out of range, 0 to 7'),
        ('--demo --video-list gone.txt', 'gone.mp4: no such file, nor 0 others from all over gone.txt'),
        ('--demo --videos-per-gpu 33', '32 training videos are too few .* 33; lower --videos-per-gpu'),
        ('--demo --image-val-list typo.txt', r'typo.txt: no such list or .* \(--image-val-list\)'),
        ('--demo --video-labels typo.txt', 'typo.txt: No such file'),
        ('--demo --image-list one_class.txt', 'one_class.txt: all 2 images are of one class'),
        ('--demo --image-labels= --image-list huge.txt', 'huge.txt: label 1000000 among 2 samples'),
        ('--demo --init-2d other.pth', 'other.pth: not weights of a SlowOnly'),
        ('--demo --freeze --resume', '--freeze needs trained weights: name them with --init'),
        ('--demo --work-dir empty.txt/work', 'empty.txt'),
        ('--demo --epochs 0', "'0' is not a whole number"),
        ('--demo --lr nan', "'nan' is not a number above 0"),
        ('--demo --videos-per-gpu 1', '--videos-per-gpu: a batch of 1 cannot be normalized'),
        ('--demo --size 100', 'multiple of 7'),
        ('--demo --video-only --image-only', '--image-only leaves no videos'),
        ('--demo --epochs 3 --warmup-epochs 4', '--warmup-epochs 4 is more than --epochs 3'),
        ('--demo --momentum 5 --lr 1', "'5' is not a number of at least 0, below 1"),
        ('--demo --lr 1 --epoks 3', 'unrecognized arguments: --epoks 3'),
        ('--demo --work-dir taken', 'taken: no checkpoint in it can be resumed'),
    ],
)
def test_bad_input_gets_one_line(demo, fails, arguments, message):
    (demo / 'empty.txt').write_text('\n\n')
    (demo / 'bad_label.txt').write_text('a.mp4 1\nb.mp4 8\n')
    (demo / 'gone.txt').write_text('gone.mp4 1\n')
    (demo / 'one_class.txt').write_text('stripes_000.jpg 0\nstripes_001.jpg 0\n')
    (demo / 'huge.txt').write_text('stripes_000.jpg 0\nstripes_001.jpg 1000000\n')
    torch.save({'model': {'conv1.weight': torch.zeros(3)}, 'optimizer': {}}, demo / 'other.pth')
    (demo / 'taken').mkdir(exist_ok=True)
    (demo / 'taken/latest.pth').touch()
    usage = any(flag in arguments for flag in ('epochs', 'lr', 'momentum', '--size', 'only'))
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


def test_the_recipes_do_what_they_say():
    """Each piece of code, as it stands in the docs, with what surrounds it where it is to be put."""
    code = DOCS.split('<!-- recipes -->\n```python\n')[1].split('```')[0]
    weights, features, jitter, smoothing, mixup, ema, balance = re.split(r'\n\n(?=# )', code.strip())
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
    space = {'clip': torch.full((3, 8, 8), 200, dtype=torch.uint8), 'rng': data.generator('test', 1)}
    exec(jitter, {'torch': torch}, space)
    assert space['clip'].dtype == torch.uint8 and 120 <= space['clip'].unique().item() <= 255

    files = data.FileList(np.arange(90).astype('S'), np.repeat([0, 1], [81, 9]))  # 9 and 3 of 12
    source, sampler = mock.Mock(train=mock.Mock(files=files)), data.JointSampler({'video': 90}, {'video': 9})
    source.name = 'video'
    shares, drawing, adding = balance.split('# and in')
    exec(shares, {'np': np, 'sources': [source], 'sampler': sampler})
    orders = []
    for nth_pass in (*range(50), 0):
        space = {'self': sampler, 'source': 'video', 'nth_pass': nth_pass, 'generator': data.generator}
        exec(f'#{drawing}', space)
        orders.append(space['order'])
    assert np.mean(files.labels[orders[:50]] == 0) == pytest.approx(0.75, abs=0.02)
    assert (orders[0] == orders[50]).all() and (orders[0] != orders[1]).any()
    sampler.orders, keys = {'video': (3, orders[3])}, []
    for place in range(90):
        exec(f'#{adding}', {'self': sampler, 'source': 'video', 'nth_pass': 3, 'place': place, 'keys': keys})
    assert len(set(keys)) == 90 > len({index for _, _, index in keys})


@pytest.mark.parametrize('accumulate', [1, 2])
def test_statistics_of_the_first_steps_are_averaged_evenly(demo, monkeypatch, accumulate):
    """Those of the first layer by hand, over a run whose weights stand still."""
    monkeypatch.chdir(demo)
    options = f'--epochs 1 --lr 1e-30 --videos-per-gpu 4 --images-per-gpu 5 --accumulate {accumulate}'
    line = f'{SMALL} --workers 0 {options} --no-validate --seed 3 --work-dir even{accumulate}'
    network = train.main(line.split())
    opened = sources.open_sources(train.parse_args(line.split()))
    joint = data.JointDataset({source.name: source.train for source in opened})
    sampler = data.JointSampler({'video': 16, 'image': 40}, {'video': 4, 'image': 5}, accumulate, seed=3)
    seen = {'video': [], 'image': []}
    for keys in (sampler.batch(s, n) for s in range(4 // accumulate) for n in range(accumulate)):
        for source, item in data.collate([joint[key] for key in keys]).items():
            x = item.pixels.float()
            x = x.transpose(1, 2).flatten(0, 1) if source == 'video' else x
            with torch.no_grad():
                x = network.conv1((x - network.mean) / network.std).transpose(0, 1).flatten(1)
            seen[source].append(torch.stack([x.mean(1), x.var(1)]))
    assert len(seen['video']) == 4
    for source, prefix in (('video', ''), ('image', 'image_')):
        ours = [getattr(network.bn1, f'{prefix}running_{name}') for name in ('mean', 'var')]
        expected = torch.stack(seen[source]).mean(0)
        torch.testing.assert_close(torch.stack(ours), expected, rtol=0.01, atol=0.005)


def test_nothing_is_mirrored_where_told(demo, monkeypatch):
    monkeypatch.chdir(demo)
    either, straight = (
        sources.open_sources(train.parse_args(['--demo', '--size', '56', *flags]))[1].train
        for flags in ([], ['--no-flip'])
    )
    pairs = [(either[0, i].pixels, straight[0, i].pixels) for i in range(12)]
    same = [torch.equal(a, b) for a, b in pairs]
    assert any(same) and not all(same)  # the crops are alike, and some are mirrored
    assert all(torch.equal(a, b if alike else b.flip(-1)) for (a, b), alike in zip(pairs, same))


def test_the_readme_s_fine_tuning_keeps_what_was_learned(trained):
    """The line as it stands there, on class folders of the demo's files."""
    folder = trained[0]
    class_folders(folder, 'few.txt', 'videos_train', 'my_videos')
    class_folders(folder, 'data/demo/video_val.txt', 'videos_val', 'my_videos_val')
    class_folders(folder, 'data/demo/image_train.txt', 'images_train', 'my_images')
    line = DOCS.split('<!-- fine-tune -->\n```\n')[1].split('\n```')[0]
    line = line.replace('\\\n', ' ').replace('python ', '').replace('work_dirs/omni', 'work_dirs/demo')
    small = DOCS.split('<!-- own clips -->\n```\n')[1].split('\n```')[0].replace('\\\n', '').split()[2:]
    assert train.parse_args(small).min_area == 0.4  # the other line for own data
    line += ' --size 28 --clip-len 2 --workers 1 --log-interval 1 --val-interval 20'
    output = run(line, folder).stdout
    assert 'starting from work_dirs/demo/best.pth; new heads: video, image\n' in output
    assert '20 steps are few; --epochs 300 ' in output and 'times the recipe' not in output
    losses = [record['loss'] for record in records(folder / 'work_dirs/mine', 'step')]
    assert len(losses) == 20 and max(losses) < 1.3 * losses[0] and losses[-1] < losses[0]
    assert 'all 20 epochs are done' in run(line, folder).stdout  # the size is read off the file again
    settings = checkpoint_in(folder / 'work_dirs/mine')['settings']
    assert (settings['width'], settings['layers']) == (8, [1, 1, 1, 1])


def test_the_readme_s_step_is_the_program_s_which_skips_what_is_not_finite():
    """Two steps, in which clipping, momentum and weight decay tell, and one with a bad gradient."""
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
        train.train_step(ours, optimizer, scaler, [batch], [seed], 999, device, clip_norm=0.5)
        torch.manual_seed(seed)
        exec(code, space | {'clips': clips, 'images': images})
    for key, value in network.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)

    ours.conv1.weight.register_hook(lambda gradient: gradient * torch.inf)
    before = copy.deepcopy([*ours.parameters()])
    train.train_step(ours, optimizer, scaler, [batch], [3], 3, device)
    assert all(map(torch.equal, ours.parameters(), before))


def test_each_step_has_its_rate_and_dropout_and_the_best_and_last_epochs_are_kept(demo, monkeypatch):
    """The loop itself, with steps that change nothing."""
    rates, seeds, others, top1 = [], [], [], iter((0.5, 0.75, 0.25, 0.75, 0.5))

    def step(network, optimizer, scaler, batches, own_seeds, number, device, precision, clip_norm):
        rates.append(optimizer.param_groups[0]['lr'])
        seeds.extend(own_seeds)
        others.append((clip_norm, number))
        keys = [f'{source}_{key}' for source in batches[0] for key in ('loss', 'top1')]
        return [dict.fromkeys(keys, torch.ones(()))] * len(batches), torch.ones(())

    monkeypatch.setattr(train, 'train_step', step)
    monkeypatch.setattr(evaluate, 'validate', lambda *_: {'video_top1': next(top1)})
    monkeypatch.setattr(Log, 'open_board', lambda *_: None)
    monkeypatch.chdir(demo)
    options = '--epochs 5 --warmup-epochs 1 --auto-scale-lr --val-interval 1 --workers 0 --work-dir looped'
    line = f'{SMALL} --width 4 --videos-per-gpu 4 --images-per-gpu 2 --accumulate 2 {options}'
    with distributed.processes('train.py') as device:
        train.train(train.parse_args(line.split()), device)
    assert rates == [train.learning_rate(number, 2, 0.05 * 8 / 128, 1, 5) for number in range(10)]
    assert others == [(1.0, number) for number in range(10)]
    assert len(set(seeds)) == len(seeds) == 20
    names = {'epoch_3.pth', 'epoch_4.pth', 'epoch_5.pth', 'best.pth', 'latest.pth'}
    assert {path.name for path in (demo / 'looped').glob('*.pth')} == names
    best, last = checkpoint_in(demo / 'looped', 'best'), checkpoint_in(demo / 'looped')
    assert best['epoch'] == 2 and last['epoch'] == 5 and last['best'][0] == best['best'][0] == 0.75


def test_a_line_of_the_log_has_the_means_of_all_ranks_and_is_json(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, 'average', lambda tensors: [tensor.add_(1) for tensor in tensors])
    monkeypatch.setattr(Log, 'open_board', lambda *_: None)
    log = Log(str(tmp_path), torch.device('cpu'))
    log.begin(0, 1, 0, 2)
    for loss in (1.0, 2.0):
        result = {'video_loss': torch.tensor(loss), 'video_top1': torch.tensor(0.5)}
        log.add([result], torch.tensor(torch.inf))
    log.line(0.1, 0)
    [record] = records(tmp_path)
    assert (record['video_loss'], record['video_top1'], record['loss']) == (2.5, 1.5, 2.5)
    assert (record['grad_norm'], record['skipped']) == (None, 2)  # JSON has no NaN
