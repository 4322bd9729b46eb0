"""What does joint training bring? Train in four ways, and compare top-1 on held-out videos and images.

    python tests/claim.py                     go on from the recorded runs; with all of them, print and plot
    python tests/claim.py --out mine.jsonl    make all runs again

A video is one cluttered scene that alternates between two looks out of eight. Its class is the pair of looks.
There are 16 pairs and each look occurs in four of them, so a single frame allows 25 % at best. Some looks are
plain, others faint: the first are learned from few videos, the others from more. An image shows a look in
another style, grey, plain and without clutter. Its class is the look, one of four; of each pair, one look has
to be learned from videos. Pictures are drawn in memory. Network, sampling, augmentation, schedule and
`train_step` are the program's own.

The ways: videos only; images first and then videos; jointly; images first and then jointly. Each takes the
same number of video steps. For each number of videos and of images it has the best of four learning rates,
chosen by seeds of their own. Images first sees as many images before as joint training does along the way. A
seed's videos are the same for all ways, so they are compared in pairs. Every run is a line of --out; what
stands there is not run again, so other settings need another --out and --work-dir.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import bench  # which has Python find the project's modules, too
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import evaluate
import train
from model import OmniSlowOnly
from runtime import checkpoint
from runtime.command import Parser

WAYS = ('videos only', 'images first', 'jointly', 'images first, then jointly')
VIDEOS_PER_CLASS, IMAGES_PER_LOOK = (2, 4, 8), (8, 64, 512)
SEEDS, TUNING_SEEDS = tuple(range(10)), (10, 11, 12)  # each has videos of its own
FEWER_SEEDS = SEEDS[:5]  # where the number of images varies
METRICS = 'top1', 'image_top1'
RATES = (0.05, 0.1, 0.2, 0.4)
HELD_OUT = 64  # of each class
STEPS, FEW_A_STEP = 600, 8  # images a step, tried as well as 32
EVEN_STEPS = 100  # that average the running statistics evenly

LOOKS = ('stripes', 'bars', 'lattice', 'dots', 'zigzag', 'braids', 'rings', 'grid')
PAIRS = [(look, (look + apart) % 8) for look in range(8) for apart in (1, 3)]  # the classes of videos
SEEN = (0, 2, 4, 6)  # the looks that images show, their classes: one of each pair
CONTRAST = (1, 0.8, 0.62, 0.5, 0.39, 0.31, 0.25, 0.2)  # of each look in videos; in images 1
# What makes it hard was set by trials on videos only; docs/comparison.md tells how.
SIDE, SIZE, CLUTTER = 48, 42, 20  # pixels of a picture and of its crop; levels
NETWORK = {'layers': (1, 1, 1, 1), 'width': 16}


# The pictures ---------------------------------------------------------------------------------------------


def is_bright(look: str, y: np.ndarray, x: np.ndarray, thick: float) -> np.ndarray:
    """Where a look is bright, in coordinates that are 1 from one repetition to the next; thick: -1 to 1."""
    v, u = y % 1 - 0.5, x % 1 - 0.5
    half, line = 0.25 + 0.1 * thick, 0.13 + 0.05 * thick
    return {
        'stripes': abs(v) < half,
        'bars': abs(u) < half,
        'lattice': (abs((x + y) % 1 - 0.5) < line) | (abs((x - y) % 1 - 0.5) < line),
        'dots': u**2 + v**2 < (0.33 + 0.06 * thick) ** 2,
        'zigzag': (y + abs(u)) % 1 < 2 * half,
        'braids': (x + abs(v)) % 1 < 2 * half,
        'rings': abs(np.hypot(u, v) - 0.32) < 0.1 + 0.03 * thick,
        'grid': (abs(v) < line) | (abs(u) < line),
    }[look]


def draw(looks: tuple[int, ...], rng: np.random.Generator, image: bool) -> torch.Tensor:
    """One frame of each look, uint8 (T, 3, SIDE, SIDE): coloured, bright on dark in one cluttered scene,
    plain or faint; or as an image: grey, bright on dark or dark on bright, plain, without the clutter."""
    back, front = rng.uniform(20, 120, (3, 1, 1)), rng.uniform(120, 240, (3, 1, 1))
    scene = rng.normal(0, 12, (SIDE, SIDE))
    if image:
        back, front = rng.permutation([back[0], front[0]])
    else:
        for cells in (2, 4, 8, 16):
            colours = torch.from_numpy(rng.normal(0, CLUTTER, (1, 3, cells, cells)))
            scene = scene + F.interpolate(colours, (SIDE, SIDE), mode='bilinear')[0].numpy()
    frames = []
    for look in looks:
        fine = 2  # drawn twice as fine, for smooth edges
        period, angle = fine * SIDE * rng.uniform(0.2, 0.32), np.deg2rad(rng.uniform(-10, 10))
        y, x = np.mgrid[: SIDE * fine, : SIDE * fine] / period
        y, x = np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x
        bright = is_bright(LOOKS[look], y + rng.uniform(), x + rng.uniform(), rng.uniform(-1, 1))
        cover = bright.reshape(SIDE, fine, SIDE, fine).mean((1, 3))
        if not image:
            cover = 0.5 + CONTRAST[look] * (cover - 0.5)
        frames.append(np.broadcast_to(back + (front - back) * cover + scene, (3, SIDE, SIDE)))
    return torch.from_numpy(np.stack(frames).clip(0, 255).astype(np.uint8))


def random_crop(pixels: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
    """The recipe's random part of pictures (N, 3, H, W), resized, mirrored or not."""
    top, left, h, w = data.crop_box(*pixels.shape[-2:], rng)
    pixels = data.resize(pixels[..., top : top + h, left : left + w], size, size)
    return pixels.flip(-1) if rng.random() < 0.5 else pixels


class Videos(data.VideoDataset):
    """In place of files: pictures in memory, `drawn`, a tensor of frames (3, 3, H, W) for each video."""

    def load(self, path: str, rng: np.random.Generator | None) -> torch.Tensor:
        frames = self.drawn[int(path)]
        frames = frames[data.sample_frames(len(frames), self.clip_len, 1, rng=rng)[0]]
        if self.mode == 'train':
            return random_crop(frames, self.size, rng).transpose(0, 1)
        return data.center_crop(frames, self.size).transpose(0, 1).unsqueeze(0)


class Images(data.ImageDataset):
    """The same, with one frame (1, 3, H, W)."""

    def load(self, path: str, rng: np.random.Generator | None) -> torch.Tensor:
        picture = self.drawn[int(path)]
        if self.mode == 'train':
            return random_crop(picture, self.size, rng)[0]
        return data.center_crop(picture, self.size)


@functools.cache
def make_set(source: str, mode: str, seed: int, per_class: int) -> Videos | Images:
    """A set with one of each class in turn; a smaller one of the same seed is the beginning of it."""
    classes = PAIRS if source == 'video' else [(look,) for look in SEEN]
    labels, drawn = np.arange(per_class * len(classes)) % len(classes), []
    for number, label in enumerate(labels):
        rng = data.generator(f'claim {source} {mode}', seed, number)
        looks = tuple(rng.permutation(classes[label]))
        looks += looks[:1] if source == 'video' else ()  # so that a clip of two begins with either
        drawn.append(draw(looks, rng, source == 'image'))
    samples = data.FileList(np.arange(len(labels)).astype('S'), labels)
    made = Videos(samples, mode, SIZE, clip_len=2) if source == 'video' else Images(samples, mode, SIZE)
    made.drawn = drawn
    return made


# One run --------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """A run. What is not named is as here."""

    way: str
    videos_per_class: int = 4
    images_per_look: int = 8
    seed: int = 0
    lr: float = 0
    image_batch: int = 32


def learn(network: OmniSlowOnly, job: Job, sources: tuple[str, ...], lr: float, steps: int) -> None:
    """So many steps of train.py on these sources."""
    sets = {}
    if 'video' in sources:
        sets['video'] = make_set('video', 'train', job.seed, job.videos_per_class)
    if 'image' in sources:
        sets['image'] = make_set('image', 'train', 0, job.images_per_look)
    for own in sets.values():
        own.seed = job.seed
    sizes = {source: len(own) for source, own in sets.items()}
    per_step = {source: job.image_batch if source == 'image' else 32 for source in sets}
    sampler = data.JointSampler(sizes, per_step, seed=job.seed)
    samples = data.JointDataset(sets)
    optimizer, device = train.make_optimizer(network, lr, 0.9, 1e-4), torch.device('cpu')
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    network.train()
    for step in range(steps):
        batch = data.collate([samples[key] for key in sampler.batch(step)])
        for group in optimizer.param_groups:
            group['lr'] = train.learning_rate(step, 1, lr, round(steps * 34 / 256), steps)
        dropout = data.generator('dropout', job.seed, step).integers(2**62).item()
        train.train_step(network, optimizer, scaler, [batch], [dropout], step, device, clip_norm=1)


def top1(network: OmniSlowOnly, source: str, seed: int) -> float:
    """On held-out samples; those that rates are chosen by are others."""
    held_out = make_set(source, 'val', int(seed in SEEDS), HELD_OUT)
    scores, labels, _ = evaluate.predict(network, source, held_out, batch_size=16)
    return round(float(np.mean(scores.argmax(1) == labels)), 4)


def new_network(seed: int, videos: bool = True, images: bool = True) -> OmniSlowOnly:
    torch.manual_seed(seed)
    hidden = 2 * len(PAIRS)  # as published
    return OmniSlowOnly(videos * len(PAIRS), images * len(SEEN), hidden=hidden, **NETWORK)


def image_network(folder: Path, job: Job) -> OmniSlowOnly:
    """The network that has learned from images alone. It is kept, as numbers of videos share it."""
    network = new_network(job.seed, videos=False)
    path = folder / f'{job.images_per_look}_{job.image_batch}_{job.seed}_{job.lr:g}.pth'
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network
    learn(network, job, ('image',), job.lr, STEPS)
    part = path.with_suffix(f'.{os.getpid()}')  # two processes may be at it
    torch.save(network.state_dict(), part)
    os.replace(part, path)
    return network


def run(folder: Path, job: Job) -> dict:
    """Train in one way. `top1` is of held-out videos and `image_top1` of images, both at the end;
    `image_before` is of images before the first video."""
    start = time.process_time()
    torch.set_num_threads(1)  # the same numbers on any number of cores
    jointly, first = 'jointly' in job.way, 'first' in job.way
    network, result = new_network(job.seed, images=jointly), {}
    if first:
        before = image_network(folder, job)
        result['image_before'] = top1(before, 'image', job.seed)
        weights = before.state_dict()
        if not jointly:  # its network has no image head; jointly it comes along, as with --init
            weights = checkpoint.matching(network, weights, 'images first', ['video'])
        network.load_state_dict(weights, strict=False)
    learn(network, job, ('video', 'image') if jointly else ('video',), job.lr, STEPS)
    result['top1'] = top1(network, 'video', job.seed)
    if first and not jointly:  # the image head as it was, and statistics of images on the trunk as it is
        network.image_head = before.image_head
        learn(network, job, ('image',), lr=0, steps=EVEN_STEPS)
    if first or jointly:
        result['image_top1'] = top1(network, 'image', job.seed)
    return result | {'seconds': round(time.process_time() - start, 1)}


# All runs, the tables and the plot ------------------------------------------------------------------------

Runs = dict[Job, dict[str, float]]
VIDEOS, FIRST, JOINTLY, BOTH = WAYS
PAIRS_OF_WAYS = (JOINTLY, FIRST), (BOTH, FIRST), (BOTH, JOINTLY), (JOINTLY, VIDEOS), (FIRST, VIDEOS)


def read(path: Path) -> Runs:
    """The recorded runs, with what each measured."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {Job(*(record.pop(field) for field in Job._fields)): record for record in records}


def claim(args: argparse.Namespace) -> None:
    """Make the runs that are not recorded yet, print the tables, draw the plot."""
    bench.need('matplotlib', 'matplotlib')  # before an hour of training, not after it
    folder, out = Path(args.work_dir), Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    runs = read(out)

    def run_all(jobs: list[Job], title: str) -> None:
        """Train what is not recorded yet, as many at a time as there are cores."""
        new = [job for job in jobs if job not in runs]
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context('spawn')) as pool:
            done = pool.map(functools.partial(run, folder), new)
            for job, measured in zip(new, tqdm(done, title, len(new), unit='run', disable=not new)):
                runs[job] = measured
                with open(out, 'a') as file:
                    print(json.dumps(job._asdict() | measured), file=file)

    settings = by_videos() + [job for job in by_images() if job.images_per_look > 8]
    tuning = itertools.product(settings, RATES, TUNING_SEEDS)
    run_all([job._replace(lr=lr, seed=seed) for job, lr, seed in tuning], 'choosing learning rates')
    bench.table(*expected(runs))
    jobs = [chosen(runs, job)._replace(seed=seed) for job in by_videos() for seed in SEEDS]
    jobs += [chosen(runs, job)._replace(seed=seed) for job in by_images() for seed in FEWER_SEEDS]
    run_all(list(dict.fromkeys(jobs)), 'comparing')
    for title, header, rows in tables(runs):
        bench.table(title, header, rows)
    plot(runs, Path(args.plot))


def by_videos() -> list[Job]:
    """All ways with each number of videos."""
    return [Job(way, count) for count in VIDEOS_PER_CLASS for way in WAYS]


def by_images() -> list[Job]:
    """The ways that have images with each number of images, and with fewer of them a step."""
    jobs = [Job(way, images_per_look=count) for count in IMAGES_PER_LOOK for way in WAYS[1:]]
    return jobs + [Job(way, image_batch=FEW_A_STEP) for way in WAYS[1:]]


def results(runs: Runs, job: Job, metric: str = 'top1', seeds: tuple[int, ...] = SEEDS) -> np.ndarray:
    """In %, of each seed in turn."""
    return 100 * np.array([runs[job._replace(seed=seed)][metric] for seed in seeds])


def chosen(runs: Runs, job: Job) -> Job:
    """The job with the learning rate at which the seeds for choosing name most videos. It is the same for
    small batches of images."""
    asked = job._replace(image_batch=32)
    means = {lr: results(runs, asked._replace(lr=lr), seeds=TUNING_SEEDS).mean() for lr in RATES}
    return job._replace(lr=max(means, key=means.get))


def expected(runs: Runs) -> tuple[str, list[str], list[list[str]]]:
    """What is known before the comparison: the rates, and the differences that ten seeds find with a power of
    80 %. A paired t-test at 5 % finds 3.14 standard errors; the spread is that of the seeds for choosing."""
    header, rows = ['videos per class', *WAYS], []
    for count in VIDEOS_PER_CLASS:
        jobs = {way: chosen(runs, Job(way, count)) for way in WAYS}
        rows.append([str(count), *(f'{job.lr:g}' for job in jobs.values())])
        for (a, b), metric in itertools.product(PAIRS_OF_WAYS[:2], METRICS):
            x, y = (results(runs, jobs[way], metric, TUNING_SEEDS) for way in (a, b))
            rows[-1].append(f'{3.14 * (x - y).std(ddof=1) / len(SEEDS) ** 0.5:.1f}')
    header += [f'{a} - {b}, {kind}' for a, b in PAIRS_OF_WAYS[:2] for kind in ('videos', 'images')]
    return 'Learning rates, and the smallest differences that will be seen', header, rows


def interval(differences: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of their mean, by Student's t over the seeds."""
    t = {5: 2.776, 10: 2.262}[len(differences)]
    half = t * differences.std(ddof=1) / len(differences) ** 0.5
    return differences.mean() - half, differences.mean() + half


def tables(runs: Runs) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of what docs/comparison.md shows."""

    def mean(job: Job, metric: str) -> str:
        return f'{results(runs, chosen(runs, job), metric).mean():.1f}'

    def cell(job: Job, metric: str, seeds: tuple[int, ...] = SEEDS) -> str:
        values = results(runs, chosen(runs, job), metric, seeds)
        return f'{values.mean():.1f} ± {values.std(ddof=1):.1f}'

    def apart(a: Job, b: Job, metric: str, other: str = '', seeds: tuple[int, ...] = SEEDS) -> str:
        x = results(runs, chosen(runs, a), metric, seeds)
        y = results(runs, chosen(runs, b), other or metric, seeds)
        low, high = interval(x - y)
        return f'{(x - y).mean():+.1f} [{low:+.1f}, {high:+.1f}]'

    both_kinds, videos, images, video_pairs, image_pairs, numbers = [], [], [], [], [], []
    for n in VIDEOS_PER_CLASS:
        jobs = {way: Job(way, n) for way in WAYS}
        videos.append([str(n), *(cell(job, 'top1') for job in jobs.values())])
        images.append(
            [str(n), cell(jobs[FIRST], 'image_before'), *(cell(jobs[w], 'image_top1') for w in WAYS[1:])]
        )
        both = [' / '.join(mean(jobs[way], metric) for metric in METRICS) for way in WAYS[1:]]
        both_kinds.append([str(n), mean(jobs[VIDEOS], 'top1'), *both])
        video_pairs.append([str(n), *(apart(jobs[a], jobs[b], 'top1') for a, b in PAIRS_OF_WAYS)])
        image_pairs.append([str(n), apart(jobs[FIRST], jobs[FIRST], 'image_top1', 'image_before')])
        image_pairs[-1] += [apart(jobs[a], jobs[b], 'image_top1') for a, b in PAIRS_OF_WAYS[:3]]
    for first, jointly, both in zip(*[iter(by_images())] * 3):
        name = f'{first.images_per_look}' + f', {FEW_A_STEP} a step' * (first.image_batch == FEW_A_STEP)
        for kind, metric in zip(('videos', 'images'), METRICS):
            row = [cell(job, metric, FEWER_SEEDS) for job in (first, jointly, both)]
            rest = [apart(a, b, metric, seeds=FEWER_SEEDS) for a, b in ((jointly, first), (both, first))]
            numbers.append([name, kind, *row, *rest])

    per, pairs = 'videos per class', [' - '.join(pair) for pair in PAIRS_OF_WAYS]
    of_images = [f'{FIRST}: end - before', *pairs[:3]]
    return [
        ('Top-1 on held-out videos / images, %, means', [per, *WAYS], both_kinds),
        (f'Top-1 on held-out videos, %, {len(SEEDS)} seeds', [per, *WAYS], videos),
        ('Top-1 on held-out images, %', [per, f'{FIRST}, before', *WAYS[1:]], images),
        ('Paired differences of videos, 95 % interval', [per, *pairs], video_pairs),
        ('Paired differences of images', [per, *of_images], image_pairs),
        ('4 videos per class', ['images per look', 'top-1', *WAYS[1:], *pairs[:2]], numbers),
    ]


def plot(runs: Runs, path: Path) -> None:
    """Left videos, right images: every run, a seed's connected, and the means."""
    from matplotlib import pyplot

    with pyplot.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'claim', 'font.family': 'sans-serif'}):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(10, 3.8), width_ratios=(4, 3), layout='constrained'
        )
        for axes, metric, ways in ((left, 'top1', WAYS), (right, 'image_top1', WAYS[1:])):
            for group, count in enumerate(VIDEOS_PER_CLASS):
                jobs = [chosen(runs, Job(way, count)) for way in ways]
                values = np.array([results(runs, job, metric) for job in jobs])
                places = 5 * group + np.arange(4)[-len(ways) :]
                axes.plot(places, values, color='gray', alpha=0.25, linewidth=0.8)
                bar = {'marker': '_', 'markersize': 20, 'markeredgewidth': 3, 'linestyle': ''}
                for place, way, own in zip(places, ways, values):
                    colour, label = f'C{WAYS.index(way)}', None if group or axes is right else way
                    axes.plot([place] * len(own), own, '.', color=colour, alpha=0.5)
                    axes.plot(place, own.mean(), color=colour, label=label, **bar)
                if axes is right:
                    before = results(runs, jobs[0], 'image_before').mean()
                    label = None if group else 'images first, before the videos'
                    axes.plot(places[0] - 1, before, color='gray', label=label, **bar)
            axes.set_xticks([5 * group + 1.5 for group in range(3)], map(str, VIDEOS_PER_CLASS))
            label = '25 %: one frame at best (videos), chance (images)' if axes is left else None
            axes.axhline(25, color='gray', linestyle='--', linewidth=0.8, label=label)
            kind = 'videos' if axes is left else 'images'
            axes.set(xlabel='training videos per class', ylabel=f'top-1 on held-out {kind}, %', ylim=(0, 102))
        left.lines[0].set_label('runs of one seed')
        figure.legend(loc='outside upper center', ncols=3, frameon=False, fontsize='small')
        figure.savefig(path, metadata={'Date': None})


def main() -> None:
    parser = Parser(__doc__)
    runs, picture = bench.ROOT / 'tests/reference/claim.jsonl', bench.ROOT / 'docs/claim.svg'
    parser.add_argument('--out', default=str(runs), help='every run (default: %(default)s)')
    parser.add_argument('--plot', default=str(picture), help='(default: %(default)s)')
    parser.add_argument(
        '--work-dir', default='work_dirs/claim', help='what images taught (default: %(default)s)'
    )
    parser.add_argument('--processes', type=int, default=os.cpu_count(), help='(default: %(default)s)')
    claim(parser.parse_args())


if __name__ == '__main__':
    main()
