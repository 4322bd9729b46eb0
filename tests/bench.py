"""Measurements: each claim of the README about time, memory and robustness, by one command.

    python tests/bench.py decode              frames of real videos, against decord and TorchCodec
    python tests/bench.py clip                file to augmented clip or image, against decord and OpenCV
    python tests/bench.py loader              joint batches from DataLoader, against its samples' CPU time
    python tests/bench.py step                a joint training step, against the network in plain Conv3d
    python tests/bench.py eval                the views of a test, against the network in plain Conv3d
    python tests/bench.py scores              30-view scores of real videos, against the reference's
    python tests/bench.py kill --times 20     runs of the demo killed at random moments and resumed
    python tests/bench.py save                what a checkpoint of SlowOnly-R50 costs the training loop

A peer runs in turn with ours, on the same input, in the same process; on a GPU one after the other, each
alone in its memory. Figures are medians. What joint training brings is measured by tests/claim.py.
The videos are MMAction2's demo and test files, looked for in $OMNI_MEDIA, else in ../shared/media beside the
project; of these, `decode` and `clip` take the H.264 files of nine seconds and more.
"""

import argparse
import contextlib
import copy
import gc
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import evaluate  # noqa: E402
import prepare  # noqa: E402
import train  # noqa: E402
from model import OmniSlowOnly, TemporalConv  # noqa: E402
from runtime import checkpoint, distributed  # noqa: E402
from video import VideoReader  # noqa: E402

MEDIA = Path(os.environ.get('OMNI_MEDIA', ROOT.parent / 'shared/media'))
REAL = Path(os.environ.get('OMNI_REAL', ROOT.parent / 'shared/real'))  # `decode` takes codecs/ from there too


def table(title: str, header: list[str], rows: list[list]) -> None:
    """Print rows under a header, columns as wide as they need."""
    cells = [[f'{x:.4g}' if isinstance(x, float) else str(x) for x in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f'\n{title}')
    for row in cells:
        print('  ' + '  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def in_turn(runs: int, functions: dict, clock=time.process_time) -> dict[str, float]:
    """Median seconds of each function; all run in turn, so that a slow moment of the machine meets all."""
    times = {name: [] for name in functions}
    for _ in range(runs + 1):
        for name, function in functions.items():
            start = clock()
            function()
            times[name].append(clock() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def need(module: str, package: str):
    """A module that only measurements need."""
    try:
        return __import__(module)
    except ImportError:
        sys.exit(f'{Path(sys.argv[0]).name} needs {module}: pip install {package}')


def long_videos() -> list[Path]:
    """H.264 files of nine seconds and more."""
    found = [path for path in sorted(MEDIA.glob('*.mp4')) if len(VideoReader(path)) > 250]
    return found or sys.exit(f'bench.py: no H.264 video of 10 seconds in {MEDIA}; OMNI_MEDIA names another')


# From files to tensors --------------------------------------------------------------------------------------


def decode(args: argparse.Namespace) -> None:
    """CPU time of decoding on one thread, against decord, whose frames should be the same, and TorchCodec."""
    readers = {
        'ours': lambda p: VideoReader(p).get_batch,
        'decord': lambda p: need('decord', 'decord').VideoReader(p, num_threads=1).get_batch,
        'TorchCodec': lambda p: __import__('torchcodec.decoders').decoders.VideoDecoder(p).get_frames_at,
    }

    def read(name: str, path: Path, clips: list[np.ndarray]) -> list:
        with contextlib.suppress(Exception):  # TorchCodec is not there, or there is no decoder for this file
            return [readers[name](str(path))(clip.ravel().tolist()) for clip in clips]
        return []

    rows, ratios = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for path in [*long_videos(), *sorted(REAL.glob('codecs/*'))]:
            length, again = len(VideoReader(path)), Path(folder) / path.name
            prepare.encode_file(str(path), str(again))
            train = [data.sample_frames(length, rng=data.generator('bench', i)) for i in range(5)]
            for kind, clips in (('training', train), ('test', [data.sample_frames(length, num_clips=10)])):
                jobs = [*((name, path) for name in readers), ('ours', again)]
                frames = [read(*job, clips) for job in jobs]
                seconds = in_turn(args.runs, {j: partial(read, *j, clips) for j, f in zip(jobs, frames) if f})
                ms = [1000 * seconds.get(job, float('nan')) / len(clips) for job in jobs]
                same = [np.array_equal(a, b.asnumpy()) for a, b in zip(*frames[:2])]
                rows.append([path.name, kind, *ms, ms[1] / ms[0], any(same) and all(same)])
                ratios.setdefault(kind + ', other codecs' * (path.parent != MEDIA), []).append(ms[1] / ms[0])
    header = ['file', 'frames', 'ours, ms', 'decord', 'TorchCodec', 're-encoded', 'faster', 'same frames']
    table('Decoding, CPU time, one thread (re-encoded: by `prepare.py encode`)', header, rows)
    for kind, values in ratios.items():
        print(f'  geometric mean, {kind}: {statistics.geometric_mean(x for x in values if x > 0):.2f}x')


def clip(args: argparse.Namespace) -> None:
    """CPU time from a file to what is trained on, against the reference's steps in decord and OpenCV."""
    decord, cv2 = need('decord', 'decord'), need('cv2', 'opencv-python-headless')
    cv2.setNumThreads(1)
    torch.set_num_threads(1)

    def crop_and_flip(pictures: list[np.ndarray], rng) -> list[np.ndarray]:
        top, left, h, w = data.crop_box(*pictures[0].shape[:2], rng)  # the same crops as ours
        pictures = [cv2.resize(p[top : top + h, left : left + w], (224, 224)) for p in pictures]
        return [cv2.flip(p, 1) for p in pictures] if rng.random() < 0.5 else pictures

    def their_clip(path: Path, rng) -> np.ndarray:
        reader = decord.VideoReader(str(path), num_threads=1)
        frames = reader.get_batch(data.sample_frames(len(reader), rng=rng).ravel().tolist()).asnumpy()
        height, width = data.short_side_to(256, *frames.shape[1:3])
        frames = crop_and_flip([cv2.resize(frame, (width, height)) for frame in frames], rng)
        return np.ascontiguousarray(np.stack(frames).transpose(3, 0, 1, 2))

    def their_image(path: Path, rng) -> np.ndarray:
        picture = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        return np.ascontiguousarray(crop_and_flip([picture], rng)[0].transpose(2, 0, 1))

    def five(load, path: Path) -> None:  # the same five clips or crops for both
        for i in range(5):
            load(path, data.generator('bench', i))

    rows, videos, images = [], data.VideoDataset(None).load, data.ImageDataset(None).load
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), 1)
        for title, paths, ours, theirs in (
            ('video to clip', long_videos(), videos, their_clip),
            ('video of 1080p to clip', sorted(MEDIA.glob('fullhd*')), videos, their_clip),
            ('JPEG of 500x375 to image', [Path(folder) / '0.jpg'], images, their_image),
        ):
            ratios = []
            for path in paths:
                again = Path(folder) / f'encoded {path.name}'
                prepare.encode_file(str(path), str(again))
                functions = {'ours': partial(five, ours, path), 'theirs': partial(five, theirs, path)}
                functions['encoded'] = partial(five, ours, again)
                ms = [1000 * seconds / 5 for seconds in in_turn(args.runs, functions).values()]
                ratios.append((ms[1] / ms[0], ms[1] / ms[2]))
                ms += [ratios[-1][1], again.stat().st_size / path.stat().st_size]
                rows.append([title, path.stem, *ms[:2], ratios[-1][0], *ms[2:]])
            means = [*map(statistics.geometric_mean, zip(*ratios))]
            rows.append([title, 'geometric mean', '', '', means[0], '', means[1], ''])
    header = ['', 'file', 'ours, ms', 'decord and OpenCV, ms', 'faster', 're-encoded, ms', 'faster', 'size']
    table('From a file to an augmented uint8 sample, CPU time, one thread', header, rows)


def write_images(folder: Path, count: int) -> None:
    """JPEGs of ImageNet's usual size and weight, 500x375 and about 110 KB, from real frames with noise."""
    frames = torch.from_numpy(VideoReader(MEDIA / 'fullhd_72f.mp4').get_batch(range(count)))
    frames = F.interpolate(frames.permute(0, 3, 1, 2).float(), (375, 500), mode='bilinear', antialias=True)
    frames += 9 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    for i, frame in enumerate(frames.round().clamp(0, 255).byte().permute(0, 2, 3, 1)):
        Image.fromarray(frame.contiguous().numpy()).save(folder / f'{i}.jpg', quality=95)


def loader(args: argparse.Namespace) -> None:
    """Joint batches of the recipe's proportions from DataLoader: how much do the workers lose?"""
    clips, images, steps, rows = args.batch, args.batch * 85 // 16, 12, []

    def samples(paths: Iterable[Path], count: int) -> data.FileList:
        return data.FileList(np.resize([os.fsencode(path) for path in paths], count), np.zeros(count, int))

    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, as workers inherit what this one has held.
        [(_, trouble)] = prepare.in_parallel(write_images, [(Path(folder), 50)], 'images')
        assert not trouble, trouble
        videos, pictures = samples(long_videos(), 300), samples(Path(folder).iterdir(), 2000)
        joint = data.JointDataset({'video': data.VideoDataset(videos), 'image': data.ImageDataset(pictures)})
        per_gpu = {'video': clips, 'image': images}
        sampler = data.JointSampler({'video': 300, 'image': 2000}, per_gpu)
        keys = [sampler.batch(step) for step in range(50 * sampler.steps_per_epoch)]
        for workers in (1, 2):
            size = (8 * clips + images) * 3 * 224 * 224  # bytes of a batch
            loaded = distributed.loader(joint, workers, size, batch_sampler=keys, collate_fn=data.collate)
            batches = iter(loaded)
            pids = [worker.pid for worker in batches._workers]
            for _ in range(3 * workers):  # until all run and their queues are full
                next(batches)
            start, before = time.perf_counter(), [*map(cpu_seconds, pids)]
            for _ in range(steps):
                next(batches)
            rate = clips * steps / (time.perf_counter() - start)
            loads = [cpu_seconds(pid) - seconds for pid, seconds in zip(pids, before)]
            peaks = [Path(f'/proc/{pid}/status').read_text().split('VmHWM:')[1].split()[0] for pid in pids]
            rows.append([workers, rate, f'{min(loads) / max(loads):.0%}', max(map(int, peaks)) >> 10])
            del batches
        torch.set_num_threads(1)  # as in a worker
        keys = keys[::9][:4]
        start = time.process_time()
        for batch in keys:
            data.collate([joint[key] for key in batch])
        own = clips * len(keys) / (time.process_time() - start)
    rows = [[n, rate, own * n, f'{rate / own / n:.0%}', *others] for n, rate, *others in rows]
    header = ['workers', 'clips/s', 'by CPU time', 'reached', 'least to most loaded', 'peak of a worker, MB']
    table(f'Joint batches of {clips} clips of 8x224x224 and {images} images', header, rows)


def cpu_seconds(pid: int) -> float:
    fields = Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


# The network ------------------------------------------------------------------------------------------------


def plain(module: nn.Module) -> nn.Module:
    """A convolution or BatchNorm of ours as it is usually written, for clips, with the same weights."""
    if isinstance(module, TemporalConv):
        weight, stride, padding = module.weight.unsqueeze(4), 1, (1, 0, 0)
    elif isinstance(module, nn.Conv2d):
        weight, stride, padding = module.weight.unsqueeze(2), (1, *module.stride), (0, *module.padding)
    else:
        norm = nn.BatchNorm3d(module.num_features, momentum=module.momentum)
        norm.load_state_dict(module.state_dict(), strict=False)  # without the images' statistics
        return norm
    conv = nn.Conv3d(weight.shape[1], weight.shape[0], weight.shape[2:], stride, padding, bias=False)
    conv.load_state_dict({'weight': weight})
    return conv


class PlainBlock(nn.Module):
    def __init__(self, ours: nn.Module):
        super().__init__()
        for name in ('conv1', 'bn1', 'conv2', 'bn2', 'conv3', 'bn3'):
            self.add_module(name, plain(getattr(ours, name)))
        self.downsample = ours.downsample and nn.Sequential(*map(plain, ours.downsample))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        still = x.shape[2] == 1 and self.conv1.kernel_size[0] == 3
        x = F.conv3d(x, self.conv1.weight.sum(2, keepdim=True)) if still else self.conv1(x)
        x = F.relu(self.bn1(x), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return F.relu(self.bn3(self.conv3(x)) + shortcut, inplace=True)


class Plain(nn.Module):
    """The peer: the joint SlowOnly-R50 as usually written, in Conv3d and BatchNorm3d, with our weights."""

    def __init__(self, ours: OmniSlowOnly):
        super().__init__()
        self.conv1, self.bn1 = plain(ours.conv1), plain(ours.bn1)
        stages = (ours.layer1, ours.layer2, ours.layer3, ours.layer4)
        self.blocks = nn.Sequential(*(PlainBlock(block) for stage in stages for block in stage))
        self.heads = copy.deepcopy(nn.ModuleDict({'video': ours.video_head, 'image': ours.image_head}))
        self.register_buffer('mean', ours.mean[:, None].clone())
        self.register_buffer('std', ours.std[:, None].clone())

    def features(self, x):
        x = x.contiguous() if x.ndim == 5 else x.contiguous().unsqueeze(2)
        x = F.relu(self.bn1(self.conv1((x - self.mean) / self.std)), inplace=True)
        x = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        return self.blocks(x).mean((2, 3, 4))

    def head(self, source):
        return self.heads[source]

    def forward(self, pixels):
        return {source: self.heads[source](self.features(x)) for source, x in pixels.items()}


class ResNet50(nn.Module):
    """What the hardware gives a well-known 2D network: torchvision's, which takes all frames as images."""

    def __init__(self, ours: OmniSlowOnly):
        super().__init__()
        self.network = torchvision.models.resnet50().to(memory_format=torch.channels_last)
        self.register_buffer('mean', ours.mean.clone())
        self.register_buffer('std', ours.std.clone())

    def forward(self, pixels):
        return {source: self.network((x - self.mean) / self.std) for source, x in pixels.items()}


def measured(device: torch.device, runs: int, makers: dict) -> Iterator[tuple[str, float, int]]:
    """Yield (name, median seconds, peak MB) of the functions that `makers` make.

    On a CPU they run in turn. On a GPU each is made, measured and let go before the next, so that the peak is
    its own; calls follow one another without a wait, as training's steps do.
    """
    if device.type == 'cpu':
        functions = {name: make() for name, make in makers.items()}
        for name, seconds in in_turn(runs, functions, time.perf_counter).items():
            yield name, seconds, 0
    for name, make in makers.items() if device.type == 'cuda' else ():
        torch.compiler.reset()  # it holds on to networks
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        function = make()
        for _ in range(3):  # in which cuDNN tries its algorithms out and the compiler compiles
            function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
        marks[0].record()
        for mark in marks[1:]:
            function()
            mark.record()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) >> 20
        del function
        yield name, statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:])) / 1000, peak


def step(args: argparse.Namespace) -> None:
    """A joint training step: the recipe's own on a GPU, 16 clips of 8x224x224 and 85 images, else small."""
    device = distributed.join('bench.py')
    on_gpu = device.type == 'cuda'
    torch.backends.cudnn.benchmark = True  # as in training
    size, clips = args.size or (224 if on_gpu else 112), args.batch if on_gpu else 2
    images, ours = clips * 85 // 16, OmniSlowOnly()
    frames = clips * 8 + images

    def batch(**shapes: tuple) -> dict[str, data.Batch]:
        pixels = {s: torch.randint(0, 256, shape, dtype=torch.uint8) for s, shape in shapes.items()}
        items = [(s, data.Sample(x, i % 400, '', [])) for s in pixels for i, x in enumerate(pixels[s])]
        batch = data.collate(items)
        for source, part in batch.items() if on_gpu else ():  # as the loader does, or copying would wait
            batch[source] = part._replace(pixels=part.pixels.pin_memory(), labels=part.labels.pin_memory())
        return batch

    def start(make: Callable, batch: dict, precision: str, compiled: bool = False) -> Callable:
        network = make(ours).to(device).train()
        options = {'force_layout_optimization': True, 'triton.cudagraphs': on_gpu}  # as in training
        net = torch.compile(network, options=options) if compiled else network
        optimizer = torch.optim.SGD(network.parameters(), 0.001, 0.9, weight_decay=1e-4, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        return partial(train.train_step, net, optimizer, scaler, [batch], [0], 999, device, precision)

    def kinds(precision: str, compiled: bool) -> Iterator[tuple[str, Callable]]:
        title = precision + ' (TF32)' * (on_gpu and precision == 'fp32') + ', compiled' * compiled
        if not compiled:
            yield f'plain Conv3d, {title}', partial(start, Plain, joint, precision)
        yield f'ours, {title}', partial(start, copy.deepcopy, joint, precision, compiled)
        if on_gpu or args.compile:
            yield f'ResNet-50, {title}', partial(start, ResNet50, flat, precision, compiled)

    joint = batch(video=(clips, 3, 8, size, size), image=(images, 3, size, size))
    flat = batch(image=(frames, 3, size, size))
    makers = dict([*kinds('fp32', False), *kinds('bf16', False)])
    makers |= kinds('bf16', True) if on_gpu or args.compile else {}
    times = {}
    print(f'\nOne step of {clips} clips of 8x{size}x{size} and {images} images on {device.type}')
    print(f'  {"":28}{"s/step":>9}{"to the first":>14}{"frames/s":>10}{"peak, MB":>10}')
    for name, seconds, peak in measured(device, args.runs, makers):
        times[name] = seconds
        ratio = f'{next(iter(times.values())) / seconds:.2f}x'
        print(f'  {name:28}{seconds:9.4f}{ratio:>14}{frames / seconds:10.1f}{peak or "":>10}', flush=True)
    for name in [name for name in times if name.startswith('ResNet-50')]:
        share = times[name] / times[name.replace('ResNet-50', 'ours')]
        print(f'  {name}: ours reaches {share:.0%} of its frames a second')
    if on_gpu:
        report_gpu(makers['ours, bf16'](), device)


def report_gpu(run: Callable, device: torch.device) -> None:
    """The card's copy bandwidth, and how often a step waits for it."""
    x = torch.empty(2**30, dtype=torch.uint8, device=device)
    [(_, seconds, _)] = measured(device, 10, {'copy': lambda: partial(torch.empty_like(x).copy_, x)})
    print(f'  copying reaches {2 * 2**30 / seconds / 1e9:.0f} GB/s on {torch.cuda.get_device_name()}')
    run()
    torch.cuda.set_sync_debug_mode('warn')  # which does not see copies of what is not pinned
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        run()
    torch.cuda.set_sync_debug_mode('default')
    print(f'  a step waits for the GPU {sum("synchroniz" in str(w.message) for w in caught)} times')


def evaluation(args: argparse.Namespace) -> None:
    """A test's views of 8x256x256, against the network in plain Conv3d with its BatchNorms."""
    device = distributed.join('bench.py')
    on_gpu = device.type == 'cuda'
    torch.manual_seed(0)
    ours, scores = OmniSlowOnly(), {}
    for module in ours.modules():  # statistics that a trained network could have
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    views = data.VideoDataset(None, 'test').load(str(long_videos()[-1]), None)[: args.views]
    views = views.pin_memory() if on_gpu else views  # as the loader does

    def start(name: str, make: Callable, precision: str) -> Callable:
        network = make(ours).to(device).eval()

        def run() -> None:  # each with as many views a pass
            scores[name] = evaluate.score_views(network, 'video', views, precision)

        return run

    fp32, folded = 'fp32 (TF32)' if on_gpu else 'fp32', partial(evaluate.fold_batchnorm, is_image=False)
    first = f'plain Conv3d, {fp32}'
    kinds = ((first, Plain, 'fp32'), (f'ours, {fp32}', folded, 'fp32'), ('ours, bf16', folded, 'bf16'))
    makers = {kind[0]: partial(start, *kind) for kind in kinds}
    times = {}
    print(f'\n{len(views)} views of 8x256x256 of a real video on {device.type}')
    print(f'  {"":28}{"s/view":>9}{"to the first":>14}{"score differs by":>18}{"peak, MB":>10}')
    for name, seconds, peak in measured(device, args.runs, makers):
        times[name] = seconds
        off, ratio = (scores[name] - scores[first]).abs().max(), f'{times[first] / seconds:.2f}x'
        print(f'  {name:28}{seconds / len(views):9.5f}{ratio:>14}{off:18.1e}{peak or "":>10}', flush=True)


def scores(args: argparse.Namespace) -> None:
    """Scores of the 30 views of each of seven real videos, against the reference's."""
    import test_real_videos as real

    rows = []
    for file in real.FILES:
        views, pixels = real.load(file, 'test')
        rows.append([file, pixels, *real.score(file, 'test', views)])
    header = ['file', 'channel means differ by', 'scores differ by', 'same top-1']
    table('30 views of 8x256x256, fp32', header, rows)


# What nothing can lose --------------------------------------------------------------------------------------

SHORT_RUN = '--demo --width 8 --epochs 4 --videos-per-gpu 20 --images-per-gpu 30 --log-interval 1 --workers 1'
SHORT_SET = 10, 2, 20, 2  # videos to train on and to validate, and images, of each class


def launch(folder: Path, processes: int, options: str) -> subprocess.Popen:
    """Start a run of the demo in a folder that saves at every step, as `train.py --resume` does."""
    launcher = f'-m torch.distributed.run --standalone --nproc_per_node={processes}' if processes > 1 else ''
    options = f'{SHORT_RUN} --val-interval 2 --save-minutes 0.0001 {options} --resume'
    line = [sys.executable, *launcher.split(), str(ROOT / 'train.py'), *options.split()]
    return subprocess.Popen(line, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(member for child in children for member in family(int(child)))]


def kill(args: argparse.Namespace) -> None:
    """Kill all processes of a run at a random moment, resume it, compare with one that was left alone."""
    rng, rows = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare.make_demo(folder / 'data/demo', *SHORT_SET)
        for processes in (1, 2):
            batch = f'--videos-per-gpu {20 // processes} --images-per-gpu {30 // processes}'
            start = time.monotonic()
            assert launch(folder, processes, f'{batch} --work-dir alone{processes}').wait() == 0
            length, identical, lines = time.monotonic() - start, 0, []
            expected = checkpoint.load_weights(folder / f'alone{processes}/latest.pth')
            for number in tqdm(range(args.times), desc=f'{processes} processes', unit='kill'):
                work_dir = f'killed{processes}_{number}'
                run = launch(folder, processes, f'{batch} --work-dir {work_dir}')
                time.sleep(rng.uniform(0, length))
                for pid in family(run.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                run.wait()
                log = folder / work_dir / 'log.jsonl'
                lines.append(len(log.read_text().splitlines()) if log.exists() else 0)
                assert launch(folder, processes, f'{batch} --work-dir {work_dir}').wait() == 0
                ends = checkpoint.load_weights(folder / work_dir / 'latest.pth')
                identical += all(torch.equal(ends[key], value) for key, value in expected.items())
            rows.append([processes, args.times, f'{min(lines)} to {max(lines)}', identical])
    header = ['processes', 'kills', 'log lines by then', 'ended bit for bit like the run that was left alone']
    table('Killed with SIGKILL at a random moment of the run, start-up included, and resumed', header, rows)
    sys.exit(any(row[1] != row[3] for row in rows))


def save(args: argparse.Namespace) -> None:
    """How long training waits for a checkpoint: until it is on the disk."""
    weights = OmniSlowOnly().state_dict()
    state = {'model': weights, 'momentum': {key: torch.zeros_like(value) for key, value in weights.items()}}
    with tempfile.TemporaryDirectory(dir='.') as folder:
        write = partial(checkpoint.write, state, Path(folder), 'latest.pth')
        seconds = in_turn(args.runs, {'': write}, time.perf_counter)['']
        size = (Path(folder) / 'latest.pth').stat().st_size / 2**20
    print(f'A checkpoint of SlowOnly-R50 with both heads, {size:.0f} MiB: training waits {seconds:.2f} s')


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    numbers = {  # option: default, help, the commands that have it
        'runs': (7, 'that a median is of', 'decode clip step eval save'),
        'batch': (16, 'clips; on a CPU a step has two', 'loader step'),
        'views': (30, 'of one video', 'eval'),
        'times': (20, 'kills for each number of processes', 'kill'),
        'seed': (0, 'of the moments', 'kill'),
    }
    for function in (decode, clip, loader, step, evaluation, scores, kill, save):
        name = 'eval' if function is evaluation else function.__name__
        command = commands.add_parser(name, help=function.__doc__)
        command.set_defaults(function=function)
        for option, (default, about, owners) in numbers.items():
            if name in owners.split():
                about = f'{about} (default: {default})'
                command.add_argument(f'--{option}', type=int, default=default, help=about)
        if function is step:
            command.add_argument('--size', type=int, help='default: 224 on a GPU, 112 on a CPU')
            command.add_argument('--compile', action='store_true', help='measure it on a CPU too')
    args = parser.parse_args()
    args.function(args)


if __name__ == '__main__':
    main()
