"""Measurements: each claim of the README about time, memory and robustness, by one command.

    python tests/bench.py decode              frames of real videos, against decord
    python tests/bench.py clip                file to augmented clip or image, against decord and OpenCV
    python tests/bench.py loader              joint batches from DataLoader, against its samples' CPU time
    python tests/bench.py step                a joint training step, against the network in plain Conv3d
    python tests/bench.py eval                the views of a test, against the network in plain Conv3d
    python tests/bench.py kill --times 20     runs of the demo killed at random moments and resumed
    python tests/bench.py soak                memory, open files and processes over 3,000 steps
    python tests/bench.py save                what a checkpoint of SlowOnly-R50 costs the training loop
    python tests/bench.py claim               does joint training help? Three ways to train, compared

A peer runs in turn with ours, on the same input, in the same process; figures are medians of several runs.
The videos are MMAction2's demo and test files, looked for in $OMNI_MEDIA, else in ../shared/media beside the
project; of these, `decode` and `clip` take the H.264 files of nine seconds and more.
"""

import argparse
import copy
import itertools
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import evaluate  # noqa: E402
import flops  # noqa: E402
import train  # noqa: E402
from model import OmniSlowOnly, fold_batchnorm, is_temporal  # noqa: E402

MEDIA = Path(os.environ.get('OMNI_MEDIA', ROOT.parent / 'shared/media'))


def table(title: str, header: list[str], rows: list[list]) -> None:
    """Print rows under a header, columns as wide as they need."""
    cells = [
        [f'{cell:.4g}' if isinstance(cell, float) else str(cell) for cell in row] for row in [header, *rows]
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
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
    """A peer's module."""
    try:
        return __import__(module)
    except ImportError:
        sys.exit(f'bench.py: the peer is not installed: pip install {package}')


def long_videos() -> list[Path]:
    """H.264 files of nine seconds and more."""
    if not MEDIA.is_dir():
        sys.exit(f'bench.py: no folder {MEDIA}; OMNI_MEDIA=FOLDER names one with H.264 videos of 10 seconds')
    found = [path for path in sorted(MEDIA.glob('*.mp4')) if len(data.VideoReader(path)) > 250]
    return found or sys.exit(f'bench.py: no H.264 videos of 10 seconds in {MEDIA}')


def geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


# ----------------------------------------------------------------------------------------------------------
# From files to tensors
# ----------------------------------------------------------------------------------------------------------


def decode(args: argparse.Namespace) -> None:
    """CPU time of decoding, against decord with one thread; the frames must be the same."""
    decord = need('decord', 'decord')
    rows, ratios = [], {'training': [], 'test': []}
    encoded = tempfile.TemporaryDirectory()
    for path in long_videos():
        again = Path(encoded.name) / path.name
        data.encode_video(path, again)
        length = len(data.VideoReader(path))
        wanted = {
            'training': data.sample_frames(length, rng=data.generator('bench', 0)).ravel(),
            'test': data.sample_frames(
                length, num_clips=10
            ).ravel(),  # clip after clip, as the reference asks
        }
        for kind, indices in wanted.items():

            def theirs(indices=indices, path=path):
                reader = decord.VideoReader(str(path), num_threads=1)
                return reader.get_batch(indices.tolist()).asnumpy()

            functions = {
                'ours': lambda p=path, i=indices: data.VideoReader(p).get_batch(i),
                'theirs': theirs,
                'encoded': lambda p=again, i=indices: data.VideoReader(p).get_batch(i),
            }
            same = np.array_equal(functions['ours'](), functions['theirs']())
            seconds = in_turn(args.runs, functions)
            ratio = seconds['theirs'] / seconds['ours']
            ratios[kind].append(ratio)
            ms = [f'{1000 * seconds[name]:.1f}' for name in functions]
            gain = f'{seconds["ours"] / seconds["encoded"]:.2f}x'
            rows.append([path.stem, f'{len(indices)} {kind}', *ms[:2], f'{ratio:.2f}x', same, ms[2], gain])
    encoded.cleanup()
    header = ['file', 'frames', 'ours, ms', 'decord, ms', 'faster', 'same frames', 're-encoded, ms', 'gain']
    table('Decoding, CPU time, one thread (re-encoded: by `data.py encode`)', header, rows)
    for kind, values in ratios.items():
        print(f'  geometric mean, {kind} frames: {geometric_mean(values):.2f}x')


def clip(args: argparse.Namespace) -> None:
    """CPU time from a file to what is trained on, against the reference's steps in decord and OpenCV."""
    decord, cv2 = need('decord', 'decord'), need('cv2', 'opencv-python-headless')
    cv2.setNumThreads(1)
    torch.set_num_threads(1)

    def crop_and_flip(pictures: list[np.ndarray], rng) -> list[np.ndarray]:
        height, width = pictures[0].shape[:2]
        while True:
            area, ratio = rng.uniform(0.08, 1) * height * width, np.exp(rng.uniform(*np.log((3 / 4, 4 / 3))))
            h, w = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
            if h <= height and w <= width:
                break
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
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

    rows = []
    videos, images = data.VideoDataset(None), data.ImageDataset(None)
    with tempfile.TemporaryDirectory() as folder:
        pictures = write_images(Path(folder), 1)
        for title, paths, ours, theirs in (
            ('video to clip', long_videos(), videos.load, their_clip),
            ('JPEG of 500x375 to image', pictures, images.load, their_image),
        ):
            ratios = []
            for path in paths:

                def five(load, path=str(path)):  # the same five crops and clips for both
                    return lambda: [load(path, data.generator('bench', i)) for i in range(5)]

                seconds = in_turn(args.runs, {'ours': five(ours), 'theirs': five(theirs)})
                ratios.append(seconds['theirs'] / seconds['ours'])
                ms = [f'{1000 * seconds[name] / 5:.1f}' for name in ('ours', 'theirs')]
                rows.append([title, Path(path).stem, *ms, f'{ratios[-1]:.2f}x'])
            rows.append([title, 'geometric mean', '', '', f'{geometric_mean(ratios):.2f}x'])
    header = ['', 'file', 'ours, ms', 'decord and OpenCV, ms', 'faster']
    table('From a file to an augmented uint8 sample, CPU time, one thread', header, rows)


def write_images(folder: Path, count: int) -> list[Path]:
    """JPEGs of ImageNet's usual size and weight, 500x375 and about 110 KB, from real frames with noise."""
    frames = torch.from_numpy(data.VideoReader(MEDIA / 'fullhd_72f.mp4').get_batch(range(count)))
    frames = F.interpolate(frames.permute(0, 3, 1, 2).float(), (375, 500), mode='bilinear', antialias=True)
    frames += 9 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    paths = [folder / f'{i}.jpg' for i in range(count)]
    for frame, path in zip(frames.round().clamp(0, 255).byte(), paths):
        torchvision.io.write_jpeg(frame, str(path), quality=95)
    return paths


def loader(args: argparse.Namespace) -> None:
    """Joint batches of the recipe's proportions from DataLoader: how much do the workers lose?"""
    videos = [os.fsencode(path) for path in long_videos()]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, as workers inherit what this one has held.
        [pictures] = data.in_parallel(write_images, [(Path(folder), 50)], 'images')
        images = [os.fsencode(path) for path in pictures]
        clips, images_per_step, steps = args.batch, args.batch * 85 // 16, 12
        sets = {
            'video': data.VideoDataset(data.Samples(np.array(videos * 100), np.zeros(300, dtype=np.int64))),
            'image': data.ImageDataset(data.Samples(np.array(images * 40), np.zeros(2000, dtype=np.int64))),
        }
        joint = data.JointDataset(sets)
        sampler = data.JointSampler(300, 2000, clips, images_per_step, epochs=50)
        for workers in (1, 2):
            batches = iter(
                DataLoader(joint, batch_sampler=sampler, collate_fn=data.collate, num_workers=workers)
            )
            pids = [worker.pid for worker in multiprocessing.active_children()]
            for _ in range(3 * workers):  # until all run and their queues are full
                next(batches)
            start, loads = time.perf_counter(), [cpu_seconds(pid) for pid in pids]
            for _ in range(steps):
                next(batches)
            wall = (time.perf_counter() - start) / steps
            loads = [cpu_seconds(pid) - load for pid, load in zip(pids, loads)]
            peak = max(memory(pid, 'status', 'VmHWM') for pid in pids)
            rows.append([workers, clips / wall, f'{min(loads) / max(loads):.0%}', peak])
            del batches
        torch.set_num_threads(1)  # as in a worker
        keys = list(sampler)[::9][:4]
        start = time.process_time()
        for batch in keys:
            data.collate([joint[key] for key in batch])
        own = clips * len(keys) / (time.process_time() - start)
        rows = [[row[0], row[1], own * row[0], f'{row[1] / own / row[0]:.0%}', *row[2:]] for row in rows]
    header = [
        'workers',
        'clips/s',
        'by the CPU time',
        'reached',
        'least to most loaded',
        'peak of a worker, MB',
    ]
    table(f'Joint batches of {clips} clips of 8x224x224 and {images_per_step} images', header, rows)


def cpu_seconds(pid: int) -> float:
    fields = Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def memory(pid: int, file: str, entry: str) -> int:
    """MB of an entry of /proc/PID/status or /proc/PID/smaps_rollup."""
    return int(Path(f'/proc/{pid}/{file}').read_text().split(f'{entry}:')[1].split()[0]) // 1024


# ----------------------------------------------------------------------------------------------------------
# The network
# ----------------------------------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    def __init__(self, in_channels: int, width: int, stride: int, temporal: bool):
        super().__init__()
        self.conv1 = plain_conv(in_channels, width, (3, 1, 1) if temporal else (1, 1, 1))
        self.conv2 = plain_conv(width, width, (1, 3, 3), stride)
        self.conv3 = plain_conv(width, 4 * width, (1, 1, 1))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm3d(c, momentum=0.01) for c in (width, width, 4 * width))
        self.downsample = None
        if stride != 1 or in_channels != 4 * width:
            shortcut = plain_conv(in_channels, 4 * width, (1, 1, 1), stride)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm3d(4 * width, momentum=0.01))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        if x.shape[2] == 1 and self.conv1.kernel_size[0] == 3:
            x = F.conv3d(x, self.conv1.weight.sum(2, keepdim=True))
        else:
            x = self.conv1(x)
        x = F.relu(self.bn1(x), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return F.relu(self.bn3(self.conv3(x)) + shortcut, inplace=True)


def plain_conv(in_channels: int, out_channels: int, kernel: tuple, stride: int = 1) -> nn.Conv3d:
    padding = tuple(size // 2 for size in kernel)
    return nn.Conv3d(in_channels, out_channels, kernel, (1, stride, stride), padding, bias=False)


class Plain(nn.Module):
    """The peer: the joint SlowOnly-R50 as it is usually written, Conv3d and BatchNorm3d throughout, with the
    weights of one of ours."""

    def __init__(self, ours: OmniSlowOnly):
        super().__init__()
        self.conv1, self.bn1 = plain_conv(3, 64, (1, 7, 7), 2), nn.BatchNorm3d(64, momentum=0.01)
        channels = 64
        for i, blocks in enumerate((3, 4, 6, 3)):
            width = 64 << i
            stage = []
            for block in range(blocks):
                stage.append(PlainBlock(channels, width, 2 if i and not block else 1, temporal=i > 1))
                channels = 4 * width
            setattr(self, f'layer{i + 1}', nn.Sequential(*stage))
        self.video_head, self.image_head = (copy.deepcopy(h) for h in (ours.video_head, ours.image_head))
        self.register_buffer('mean', ours.mean[None, :, None].clone())
        self.register_buffer('std', ours.std[None, :, None].clone())
        state = {
            key: value.unsqueeze(4 if is_temporal(value) else 2) if value.ndim == 4 else value
            for key, value in ours.state_dict().items()
            if 'image_running_' not in key
        }
        self.load_state_dict({key: value.contiguous() for key, value in state.items()}, strict=False)

    def features(self, x):
        x = ((x.float().flatten(2) - self.mean.flatten(2)) / self.std.flatten(2)).view(x.shape)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3, 4))

    def forward(self, clips, images=None):
        logits = self.video_head(self.features(clips.contiguous()))
        if images is None:
            return logits
        return logits, self.image_head(self.features(images.contiguous().unsqueeze(2)))


def step(args: argparse.Namespace) -> None:
    """A joint training step: the recipe's own on a GPU, 16 clips of 8x224x224 and 85 images, else small."""
    device = evaluate.pick_device()
    on_gpu = device.type == 'cuda'
    size, clips = args.size or (224 if on_gpu else 112), args.batch if on_gpu else 2
    images = clips * 85 // 16
    pixels = [torch.randint(0, 256, (3, 8, size, size), dtype=torch.uint8) for _ in range(clips)]
    pixels += [torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in range(images)]
    batch = data.collate([data.Item(x, i % 400, '', []) for i, x in enumerate(pixels)])
    ours, peaks = OmniSlowOnly(), {}

    def stepper(name: str, network: nn.Module, precision: str, compiled: bool = False):
        network = network.to(device).train()
        net = torch.compile(network) if compiled else network
        optimizer = torch.optim.SGD(network.parameters(), 0.001, momentum=0.9, weight_decay=1e-4, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=False)

        def run():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            results = train.train_step(net, optimizer, scaler, batch, device, precision)
            if on_gpu:
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() >> 20
            return results

        return run

    fp32 = 'fp32 (TF32)' if on_gpu else 'fp32'
    if on_gpu:
        torch.backends.cudnn.benchmark = True
    functions = {}
    for name, network, precision, compiled in (
        (f'plain Conv3d, {fp32}', Plain(ours), 'fp32', False),
        ('plain Conv3d, bf16', Plain(ours), 'bf16', False),
        (f'ours, {fp32}', copy.deepcopy(ours), 'fp32', False),
        ('ours, bf16', copy.deepcopy(ours), 'bf16', False),
        ('ours, bf16, compiled', copy.deepcopy(ours), 'bf16', True),
    ):
        if compiled and not (on_gpu or args.compile):
            continue
        functions[name] = stepper(name, network, precision, compiled)
    if on_gpu:
        functions['torchvision ResNet-50, bf16, compiled'] = resnet_step(device, clips * 8, size)
    seconds = in_turn(args.runs, functions, time.perf_counter)

    with torch.device('meta'):
        meta = OmniSlowOnly()
        costs = [flops.count(meta, torch.empty(1, 3, *shape)) for shape in ((8, size, size), (size, size))]
        costs += [flops.count(meta, torch.empty(1, 3, size, size))]
    macs = [sum(part[0] for part in cost.values()) for cost in costs]
    work = 3 * 2 * (clips * macs[0] + images * macs[1])  # the backward pass costs two forward passes
    base = seconds[f'plain Conv3d, {fp32}']
    rows = []
    for name, value in seconds.items():
        frames, done = clips * 8 + images, work
        if 'ResNet' in name:
            frames, done = clips * 8, 3 * 2 * clips * 8 * macs[2]
        rows.append(
            [
                name,
                value,
                f'{base / value:.2f}x',
                frames / value,
                f'{done / value / 1e12:.3g}',
                peaks.get(name, ''),
            ]
        )
    header = ['', 's/step', 'to the first', 'frames/s', 'TFLOP/s', 'peak, MB']
    table(f'One step of {clips} clips of 8x{size}x{size} and {images} images on {device.type}', header, rows)
    if on_gpu:
        report_gpu(functions['ours, bf16'], batch, device)


def resnet_step(device: torch.device, frames: int, size: int):
    """What the hardware gives a well-known 2D network: torchvision's ResNet-50 on as many frames."""
    network = torchvision.models.resnet50().to(device, memory_format=torch.channels_last)
    net = torch.compile(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.001, momentum=0.9, weight_decay=1e-4, fused=True)
    x = torch.randn(frames, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.zeros(frames, dtype=torch.long, device=device)

    def run():
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.cuda.synchronize()

    return run


def report_gpu(run, batch: dict, device: torch.device) -> None:
    """The card's copy bandwidth, and how often a step waits for it."""
    x = torch.empty(2**30, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    y.copy_(x)
    start.record()
    for _ in range(10):
        y.copy_(x)
    end.record()
    torch.cuda.synchronize()
    rate = 2 * 10 * 2**30 / start.elapsed_time(end) / 1e6
    print(f'  copying reaches {rate:.0f} GB/s on {torch.cuda.get_device_name()}')
    synchronize = torch.cuda.synchronize
    torch.cuda.synchronize = lambda *_: None  # the measurement's own
    torch.cuda.set_sync_debug_mode('warn')
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter('always')
        run()
    torch.cuda.set_sync_debug_mode('default')
    torch.cuda.synchronize = synchronize
    print(f'  a step waits for the GPU {len(waits)} times')


def evaluation(args: argparse.Namespace) -> None:
    """A test's views of 8x256x256, against the network in plain Conv3d with its BatchNorms."""
    device = evaluate.pick_device()
    torch.manual_seed(0)
    ours = OmniSlowOnly()
    for module in ours.modules():  # statistics that a trained network could have
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    plain, folded = Plain(ours).to(device).eval(), fold_batchnorm(ours, is_image=False).to(device)
    views = data.VideoDataset(None, 'test').load(str(long_videos()[-1]), None)[: args.views]
    scores = {}

    @torch.inference_mode()
    def theirs():
        scores['plain Conv3d, fp32'] = torch.cat(
            [plain(part.to(device)).softmax(1) for part in views.split(2)]
        ).cpu()

    def function(precision):
        def run():
            scores[f'ours, {precision}'] = evaluate.score_views(folded, views, precision)

        return run

    functions = {'plain Conv3d, fp32': theirs, 'ours, fp32': function('fp32'), 'ours, bf16': function('bf16')}
    seconds = in_turn(args.runs, functions, time.perf_counter)
    expected, base = scores['plain Conv3d, fp32'], seconds['plain Conv3d, fp32']
    rows = []
    for name, value in seconds.items():
        off = (scores[name] - expected).abs().max().item()
        rows.append([name, value / len(views), f'{base / value:.2f}x', off])
    header = ['', 's/view', 'faster', 'largest score difference']
    table(f'{len(views)} views of 8x256x256 of a real video on {device.type}', header, rows)


# ----------------------------------------------------------------------------------------------------------
# What nothing can lose
# ----------------------------------------------------------------------------------------------------------

SHORT_RUN = (
    '--demo --width 8 --epochs 4 --videos-per-gpu 20 --images-per-gpu 30 --log-interval 1 --val-interval 2 '
    '--workers 1'
).split()


def launch(folder: Path, processes: int, *options: str) -> subprocess.Popen:
    """Start a run of the demo that saves at every step, in `folder`/run, as `train.py --resume` does."""
    line = [sys.executable]
    if processes > 1:
        line += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    line += [str(ROOT / 'train.py'), *SHORT_RUN, '--save-minutes', '0.0001', *options, '--resume']
    return subprocess.Popen(line, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(member for child in children for member in family(int(child)))]


def final(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / 'latest.pth', weights_only=True)['model']


def kill(args: argparse.Namespace) -> None:
    """Kill all processes of a run at a random moment, resume it, compare with one that was left alone."""
    rng, rows = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data.make_demo(folder / 'data/demo', train_videos=10, val_videos=2, train_images=20, val_images=2)
        for processes in (1, 2):
            batch = ['--videos-per-gpu', str(20 // processes), '--images-per-gpu', str(30 // processes)]
            start = time.monotonic()
            assert launch(folder, processes, *batch, '--work-dir', 'alone').wait() == 0
            length = time.monotonic() - start
            expected = final(folder / 'alone')
            identical, epochs = 0, []
            for number in tqdm(range(args.times), desc=f'{processes} processes', unit='kill'):
                work_dir = f'killed{processes}_{number}'
                run = launch(folder, processes, *batch, '--work-dir', work_dir)
                time.sleep(rng.uniform(0, length))
                for pid in family(run.pid):
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                run.wait()
                log = folder / work_dir / 'log.jsonl'
                epochs.append(len(log.read_text().splitlines()) if log.exists() else 0)
                assert launch(folder, processes, *batch, '--work-dir', work_dir).wait() == 0
                ends = final(folder / work_dir)
                identical += all(torch.equal(ends[key], value) for key, value in expected.items())
            rows.append([processes, args.times, f'{min(epochs)} to {max(epochs)}', identical])
            (folder / 'alone/latest.pth').rename(folder / f'alone{processes}.pth')
            for file in (folder / 'alone').iterdir():
                file.unlink()
    table(
        'Killed with SIGKILL at a random moment of the run, start-up included, and resumed',
        ['processes', 'kills', 'log lines by then', 'ended bit for bit like the run that was left alone'],
        rows,
    )
    sys.exit(any(row[1] != row[3] for row in rows))


def soak(args: argparse.Namespace) -> None:
    """Watch one long run of the demo's loop: what grows?"""
    before = set(os.listdir('/dev/shm'))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data.make_demo(folder / 'data/demo', train_videos=10, val_videos=2, train_images=20, val_images=2)
        options = ['--videos-per-gpu', '4', '--images-per-gpu', '6', '--val-interval', '5']
        options += ['--save-minutes', '0.2', '--work-dir', 'run', '--workers', '2']
        steps_per_epoch = 80 // 6
        options += ['--epochs', str(-(-args.steps // steps_per_epoch)), '--log-interval', '10']
        run = launch(folder, 1, *options)
        log, seen, zombies = folder / 'run/log.jsonl', {'main process': [], 'largest worker': []}, Counter()
        with tqdm(total=args.steps, unit='step') as bar:
            while run.poll() is None:
                time.sleep(1)
                lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
                last = next((line for line in reversed(lines) if 'step' in line), {'epoch': 1, 'step': 0})
                steps = (last['epoch'] - 1) * steps_per_epoch + last['step']
                bar.update(steps - bar.n)
                largest = (0, 0)
                for pid in family(run.pid):
                    try:
                        own = memory(pid, 'smaps_rollup', 'Anonymous')
                        open_files = len(os.listdir(f'/proc/{pid}/fd'))
                        state = Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0]
                    except (FileNotFoundError, ProcessLookupError, PermissionError, IndexError):
                        continue
                    zombies[pid] += state == 'Z'
                    largest = max(largest, (own, open_files)) if pid != run.pid else largest
                    if pid == run.pid:
                        seen['main process'].append((steps, own, open_files))
                if largest[0]:  # there is none for a moment when a validation begins or ends
                    seen['largest worker'].append((steps, *largest))
        assert run.returncode == 0
    rows = []
    for name, samples in seen.items():
        samples = np.array([sample for sample in samples if sample[0] > args.steps // 6])
        slope = np.polyfit(samples[:, 0], samples[:, 1], 1)[0] * 1000
        third = len(samples) // 3
        ends = [np.median(part, 0) for part in (samples[:third], samples[-third:])]
        memories, files = ([f'{end[i]:.0f}' for end in ends] for i in (1, 2))
        rows.append([name, *memories, f'{slope:+.2f}', *files])
    table(
        f'{args.steps} steps; medians of the first and the last third, after a sixth of them to warm up',
        ['process', 'own memory, MB', '', 'slope, MB per 1000 steps', 'open files', ''],
        rows,
    )
    left = len(set(os.listdir('/dev/shm')) - before)
    stayed = sum(count > 5 for count in zombies.values())
    print(f'  files left in /dev/shm: {left}; zombies for over 5 seconds: {stayed}; ', end='')
    print(f'processes left: {len(family(run.pid))}')


def save(args: argparse.Namespace) -> None:
    """How long training waits for a checkpoint, and how long one takes to be on the disk."""
    network = OmniSlowOnly()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    for parameter in network.parameters():
        optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    waits, takes = [], []
    with tempfile.TemporaryDirectory(dir='.') as folder:
        saver = train.Saver(Path(folder))
        for _ in range(args.runs + 1):
            start = time.perf_counter()
            saver.save({'model': network.state_dict(), 'optimizer': optimizer.state_dict()}, 'latest.pth')
            waits.append(time.perf_counter() - start)
            assert not saver.finish()
            takes.append(time.perf_counter() - start)
        size = (Path(folder) / 'latest.pth').stat().st_size / 2**20
    table(
        f'A checkpoint of SlowOnly-R50 with both heads, {size:.0f} MB',
        ['', 'first, s', f'median of the next {args.runs}, s'],
        [
            ['training waits', waits[0], statistics.median(waits[1:])],
            ['until it is on the disk', takes[0], statistics.median(takes[1:])],
        ],
    )


# ----------------------------------------------------------------------------------------------------------
# Does joint training help?
# ----------------------------------------------------------------------------------------------------------

ARMS = ('videos', 'images first', 'joint')
VIDEOS_PER_CLASS = (1, 4, 16)
SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (5, 6)  # each has videos of its own
RATES, TUNED_AT = (0.025, 0.05, 0.1), 4
CLUTTER = 90  # levels; chosen by videos only, such that they lie between chance and perfect
STEPS, CLIPS, IMAGES = 768, 8, 32  # video steps of every run, and its batches


def claim(args: argparse.Namespace) -> None:
    """Train on few videos in three ways, and compare top-1 on held-out videos.

    From scratch on videos; on images first and then on videos; jointly. Each run is a command of train.py,
    with the same network, number of video steps and schedule; each of five seeds has videos and first weights
    of its own. Each way has the best of three learning rates, chosen at 4 videos per class by two more seeds
    on videos of their own. Every run is a line of --out; what stands there is not run again.
    """
    need('matplotlib', 'matplotlib')  # before hours of training, not after them
    folder, out = Path(args.work_dir).absolute(), Path(args.out)
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

    def run_all(jobs: list[tuple], title: str) -> None:
        """Train what is not recorded yet; on a CPU as many at a time as there are cores."""
        known = {(r['arm'], r['videos_per_class'], r['seed'], r['lr']) for r in records}
        new = [job for job in jobs if job not in known]
        if new and not (folder / 'choose.txt').exists():
            make_claim_data(folder)
        bar = tqdm(initial=len(jobs) - len(new), total=len(jobs), desc=title, unit='run')
        with ThreadPoolExecutor(1 if torch.cuda.is_available() else os.cpu_count()) as pool:
            for record in pool.map(lambda job: train_arm(folder, *job), new):
                records.append(record)
                with open(out, 'a') as file:
                    print(json.dumps(record), file=file)
                bar.update()
        bar.close()

    # Their learning rate is the demo's: it takes them to 99 % or more.
    run_all([('images', 0, seed, 0.05) for seed in SEEDS + TUNING_SEEDS], 'images first')
    tuning = list(itertools.product(ARMS, [TUNED_AT], TUNING_SEEDS, RATES))
    run_all(tuning, 'choosing learning rates')
    chosen = {}
    for arm in ARMS:
        means = {}
        for lr in RATES:
            tried = [r for r in records if (r['arm'], r['lr']) == (arm, lr) and r['seed'] in TUNING_SEEDS]
            means[lr] = statistics.mean(r['video_top1'] for r in tried)
        chosen[arm] = max(means, key=means.get)
    runs = itertools.product(ARMS, VIDEOS_PER_CLASS, SEEDS)
    run_all([(arm, count, seed, chosen[arm]) for arm, count, seed in runs], 'comparing')

    results = {cell: [] for cell in itertools.product(ARMS, VIDEOS_PER_CLASS)}
    for record in records:
        if record['seed'] in SEEDS and record['lr'] == chosen.get(record['arm']):
            results[record['arm'], record['videos_per_class']].append(record)

    def shown(arm: str, count: int, metric: str = 'video_top1') -> str:
        values = [100 * r[metric] for r in results[arm, count]]
        return f'{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}'

    rows = []
    for count in VIDEOS_PER_CLASS:
        rows.append([count, *(shown(arm, count) for arm in ARMS), shown('joint', count, 'image_top1')])
    table(
        f'Top-1 on 256 held-out videos of 8 classes, %: mean and standard deviation of {len(SEEDS)} seeds',
        ['videos per class', *ARMS, "joint's images"],
        rows,
    )
    print('  learning rates: ' + ', '.join(f'{arm} {lr:g}' for arm, lr in chosen.items()))
    plot_claim(results, Path(args.plot))


def make_claim_data(folder: Path) -> None:
    """Videos and images below `folder`, and a list of training videos for each seed and number of them."""
    data.make_demo(folder / 'data', train_videos=144, val_videos=32, train_images=256, clutter=CLUTTER)
    lines = (
        (folder / 'data/video_train.txt').read_text().splitlines()
    )  # one of each of the eight classes in turn
    for seed, count in itertools.product(SEEDS + TUNING_SEEDS, VIDEOS_PER_CLASS):
        own = lines[8 * 16 * seed :][: 8 * count]
        (folder / f'train_{count}_{seed}.txt').write_text('\n'.join(own))
    (folder / 'choose.txt').write_text('\n'.join(lines[8 * 112 :]))


def train_arm(folder: Path, arm: str, count: int, seed: int, lr: float) -> dict:
    """One run of train.py; what it measured at its end. A run that was broken off goes on."""
    name = f'{arm}_{count}_{seed}_{lr:g}'.replace(' ', '_')
    samples, batch = (1024, IMAGES) if arm == 'images' else (8 * count, CLIPS)
    epochs = str(STEPS * batch // samples)
    line = [sys.executable, str(ROOT / 'train.py'), '--work-dir', str(folder / name), '--resume']
    line += ['--epochs', epochs, '--val-interval', epochs, '--log-interval', '1000', '--workers', '1']
    line += ['--seed', str(seed), '--lr', str(lr), '--clip-norm', '1']
    line += ['--videos-per-gpu', str(CLIPS), '--images-per-gpu', str(IMAGES)]
    if torch.cuda.is_available():
        line += ['--size', '112']  # of the full network
    else:
        line += ['--size', str(train.DEMO['size']), '--width', str(train.DEMO['width'])]
        line += ['--layers', *map(str, train.DEMO['layers'])]
    val = ('choose.txt', 'videos_train') if seed in TUNING_SEEDS else ('data/video_val.txt', 'videos_val')
    for flag, list_file, root in (
        ('video', f'train_{count}_{seed}.txt', 'videos_train'),
        ('val', *val),
        ('image', 'data/image_train.txt', 'images_train'),
        ('image-val', 'data/image_val.txt', 'images_val'),
    ):
        line += [f'--{flag}-list', str(folder / list_file), f'--{flag}-root', str(folder / 'data' / root)]
    line += {
        'videos': ['--video-only'],
        'images': ['--image-only'],
        'images first': ['--video-only', '--init-2d', str(folder / f'images_0_{seed}_0.05/latest.pth')],
        'joint': [],
    }[arm]
    environment = os.environ | {'OMP_NUM_THREADS': '1'}  # the same numbers on any number of cores
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f'bench.py: {" ".join(line)}\n{done.stderr}')
    log = (folder / name / 'log.jsonl').read_text().splitlines()
    result = next(json.loads(entry) for entry in reversed(log) if '"val"' in entry)
    result = {key: value for key, value in result.items() if key.endswith('_top1')}
    return {'arm': arm, 'videos_per_class': count, 'seed': seed, 'lr': lr, **result}


def plot_claim(results: dict, path: Path) -> None:
    """Draw the table's videos: for each way to train every run, the mean and the standard deviation."""
    from matplotlib import pyplot

    with pyplot.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'claim', 'font.family': 'sans-serif'}):
        figure, axes = pyplot.subplots(figsize=(7, 3.6), layout='constrained')
        for i, arm in enumerate(ARMS):
            values = [[100 * r['video_top1'] for r in results[arm, count]] for count in VIDEOS_PER_CLASS]
            places = [count * 1.06 ** (i - 1) for count in VIDEOS_PER_CLASS]  # side by side
            means, spreads = ([f(v) for v in values] for f in (statistics.mean, statistics.stdev))
            axes.errorbar(places, means, spreads, fmt='o-', color=f'C{i}', capsize=3, label=arm)
            for place, runs in zip(places, values):
                axes.plot([place] * len(runs), runs, '_', color=f'C{i}', alpha=0.6)
        axes.axhline(100 / 8, color='gray', linestyle=':', label='chance')
        axes.set_xscale('log')
        axes.set_xticks(VIDEOS_PER_CLASS, map(str, VIDEOS_PER_CLASS), minor=False)
        axes.set_xticks([], minor=True)
        axes.set(xlabel='training videos per class', ylabel='top-1 on held-out videos, %', ylim=(0, 100))
        figure.legend(loc='outside right upper', frameon=False)
        figure.savefig(path, metadata={'Date': None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0],
        epilog=__doc__.split('\n\n', 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    for function in (decode, clip, loader, step, evaluation, kill, soak, save, claim):
        name = 'eval' if function is evaluation else function.__name__
        command = commands.add_parser(name, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument(
            '--runs', type=int, default=7, help='runs that a median is of (default: %(default)s)'
        )
        if function in (loader, step):
            command.add_argument('--batch', type=int, default=16, help='clips; on a CPU a step has two')
        if function is step:
            command.add_argument('--size', type=int, help='default: 224 on a GPU, 112 on a CPU')
            command.add_argument('--compile', action='store_true', help='measure it on a CPU too')
        if function is evaluation:
            command.add_argument('--views', type=int, default=30)
        if function is kill:
            command.add_argument('--times', type=int, default=20, help='kills for each number of processes')
            command.add_argument('--seed', type=int, default=0, help='of the moments')
        if function is soak:
            command.add_argument('--steps', type=int, default=3000)
        if function is claim:
            command.add_argument('--out', default=str(ROOT / 'tests/reference/claim.jsonl'), help='every run')
            command.add_argument('--plot', default=str(ROOT / 'assets/claim.svg'))
            command.add_argument('--work-dir', default='work_dirs/claim', help='about 300 MB')
    args = parser.parse_args()
    args.function(args)


if __name__ == '__main__':
    main()
