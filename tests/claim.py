"""Does joint training help? Train on few videos in three ways, and compare top-1 on held-out videos.

    python tests/claim.py                     go on from the recorded runs; with all of them, print and plot
    python tests/claim.py --out mine.jsonl    make all runs again

A video is one cluttered scene that alternates between two looks out of eight, and its class is which two: 16
of the 28 pairs, each look in four of them, so that who sees one frame is right 25 % of the time at best. An
image shows one look in another style, grey and without clutter, and its class is the look. Pictures are drawn
in memory; network, sampling, augmentation, schedule and `train_step` are the program's own.

From scratch on videos; on images first and then on videos; jointly. Each way takes the same number of video
steps and has the best of four learning rates, chosen at one size by seeds of their own; images first sees as
many images before as joint training does along the way. A seed's videos are the same for all three, so they
are compared in pairs. Every run is a line of --out; what stands there is not run again.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

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

ARMS = ('videos', 'images first', 'joint')
VIDEOS_PER_CLASS = (2, 4, 8)
SEEDS, TUNING_SEEDS = tuple(range(10)), (10, 11, 12)  # each has videos of its own
RATES, TUNED_AT = (0.025, 0.05, 0.1, 0.2), 4
IMAGE_RATE = 0.1  # of the images that come first: takes them to 98 %
SHARES = (0.5, 1, 2)  # of the image loss in a joint step; the others at TUNED_AT videos per class only

LOOKS = ('stripes', 'bars', 'lattice', 'dots', 'zigzag', 'braids', 'rings', 'grid')
PAIRS = [(look, (look + apart) % 8) for look in range(8) for apart in (1, 3)]  # the classes of videos
IMAGES_PER_LOOK, HELD_OUT = 32, 64  # of each class; videos only set how hard it is, before any image was used
SIDE, SIZE, CLUTTER = 48, 42, 20  # pixels of a picture and of its crop; levels
NETWORK = {'layers': (1, 1, 1, 1), 'width': 16}
STEPS, BATCH = 600, {'video': 32, 'image': 32}


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
    """One frame of each look, uint8 (T, 3, SIDE, SIDE): coloured, bright on dark in one cluttered scene; or
    as an image: grey, bright on dark or dark on bright, without the clutter."""
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
        frames.append(np.broadcast_to(back + (front - back) * cover + scene, (3, SIDE, SIDE)))
    return torch.from_numpy(np.stack(frames).clip(0, 255).astype(np.uint8))


class Drawn:
    """In place of files: pictures in memory. `drawn` has a tensor of frames (T, 3, H, W) for each sample."""

    def load(self, path: str, rng: np.random.Generator | None) -> torch.Tensor:
        frames = self.drawn[int(path)]
        if isinstance(self, data.VideoDataset):
            frames = frames[data.sample_frames(len(frames), self.clip_len, 1, rng=rng)[0]]
        if rng is None:
            pixels = data.center_crop(frames, self.size)
        else:
            pixels = data.random_resized_crop(frames, self.size, rng)
        pixels = pixels.transpose(0, 1) if isinstance(self, data.VideoDataset) else pixels[0]
        return pixels.unsqueeze(0) if rng is None else pixels


class Videos(Drawn, data.VideoDataset):
    pass


class Images(Drawn, data.ImageDataset):
    pass


@functools.cache
def make_set(source: str, mode: str, seed: int, per_class: int) -> Videos | Images:
    """A set with one of each class in turn; a smaller one of the same seed is the beginning of it."""
    image = source == 'image'
    classes, samples, drawn = [(look,) for look in range(len(LOOKS))] if image else PAIRS, [], []
    for number in range(per_class * len(classes)):
        rng = data.generator(f'claim {source} {mode}', seed, number)
        looks = tuple(rng.permutation(classes[number % len(classes)]))
        drawn.append(draw(looks if image else looks + looks[:1], rng, image))  # a clip begins with either
        samples.append((b'%d' % number, number % len(classes)))
    paths, labels = (np.array(column) for column in zip(*samples))
    samples = data.Samples(paths, labels)
    made = Images(samples, mode, SIZE) if image else Videos(samples, mode, SIZE, clip_len=2)
    made.drawn = drawn
    return made


# One run --------------------------------------------------------------------------------------------------


def learn(network: OmniSlowOnly, sets: dict[str, Videos | Images], lr: float, seed: int) -> None:
    """STEPS steps of train.py on these sets."""
    optimizer = torch.optim.SGD(network.parameters(), lr, 0.9, weight_decay=1e-4, fused=True)
    for parameter in network.parameters():  # the fused step wants them there
        optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    scaler, device = torch.amp.GradScaler('cpu', enabled=False), torch.device('cpu')
    for own in sets.values():
        own.seed = seed
    samples = data.JointDataset(sets)
    sizes = {source: len(own) for source, own in sets.items()}
    # more epochs than it takes: the steps are counted
    sampler = data.JointSampler(sizes, {source: BATCH[source] for source in sets}, seed=seed, epochs=STEPS)
    network.train()
    for step, keys in zip(range(STEPS), sampler):
        batch = data.collate([samples[key] for key in keys])
        for group in optimizer.param_groups:
            group['lr'] = train.learning_rate(step, 1, lr, round(STEPS * 34 / 256), STEPS)
        dropout = data.generator('dropout', seed, step).integers(2**62).item()
        train.train_step(network, optimizer, scaler, [batch], [dropout], device, clip_norm=1)


def predict(network: OmniSlowOnly, source: str, held_out: Videos | Images) -> tuple[np.ndarray, np.ndarray]:
    """The class that each sample is taken for, and its own."""
    scores, labels, _ = evaluate.predict(network, source, held_out, batch_size=16)
    return scores.argmax(1), labels


def new_network(seed: int, **classes: int) -> OmniSlowOnly:
    torch.manual_seed(seed)
    return OmniSlowOnly(**({'video_classes': 0, 'image_classes': 0} | classes), **NETWORK)


def image_network(folder: Path, seed: int) -> OmniSlowOnly:
    """The network that has learned from images alone; the same for every number of videos, so it is kept."""
    network, path = new_network(seed, image_classes=len(LOOKS)), folder / f'images_{seed}.pth'
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network
    learn(network, {'image': make_set('image', 'train', 0, IMAGES_PER_LOOK)}, IMAGE_RATE, seed)
    part = path.with_suffix(f'.{os.getpid()}')  # two processes may be at it
    torch.save(network.state_dict(), part)
    os.replace(part, path)
    return network


def run(folder: Path, arm: str, count: int, seed: int, lr: float, share: float) -> dict:
    """Train in one way; what the network has learned."""
    start = time.process_time()
    torch.set_num_threads(1)  # the same numbers on any number of cores
    network = new_network(seed, video_classes=len(PAIRS), image_classes=len(LOOKS) if arm == 'joint' else 0)
    sets = {'video': make_set('video', 'train', seed, count)}
    if arm == 'joint':
        sets['image'] = make_set('image', 'train', 0, IMAGES_PER_LOOK)
        if share != 1:  # scales the gradients of the image loss; the logits stay as they are
            network.image_head.register_forward_hook(
                lambda head, inputs, logits: share * logits + (1 - share) * logits.detach()
            )
    if arm == 'images first':  # as --init-2d does
        weights = image_network(folder, seed).state_dict()
        network.load_state_dict(checkpoint.inflate_2d(weights, network), strict=False)
    learn(network, sets, lr, seed)

    held_out = make_set('video', 'val', int(seed in SEEDS), HELD_OUT)  # others than rates are chosen by
    predicted, labels = predict(network, 'video', held_out)
    right = [len({*PAIRS[a]} & {*PAIRS[b]}) / 2 for a, b in zip(predicted, labels)]
    result = {'top1': np.mean(predicted == labels), 'looks': np.mean(right)}
    if arm != 'videos':
        network = network if arm == 'joint' else image_network(folder, seed)  # before its videos
        predicted, labels = predict(network, 'image', make_set('image', 'val', 0, HELD_OUT))
        result['image_top1'] = np.mean(predicted == labels)
    job = {'arm': arm, 'videos_per_class': count, 'seed': seed, 'lr': lr, 'share': share}
    result = {key: round(float(value), 4) for key, value in result.items()}
    return job | result | {'seconds': round(time.process_time() - start, 1)}


# All runs, the tables and the plot ------------------------------------------------------------------------


def claim(args: argparse.Namespace) -> None:
    """Make the runs that are not recorded yet, print the tables, draw the plot."""
    bench.need('matplotlib', 'matplotlib')  # before an hour of training, not after it
    folder, out = Path(args.work_dir), Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

    def run_all(jobs: list[tuple], title: str) -> None:
        """Train what is not recorded yet, as many at a time as there are cores."""
        known = {tuple(r[key] for key in ('arm', 'videos_per_class', 'seed', 'lr', 'share')) for r in records}
        new = [job for job in jobs if job not in known]
        bar = tqdm(initial=len(jobs) - len(new), total=len(jobs), desc=title, unit='run')
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context('spawn')) as pool:
            for record in pool.map(functools.partial(run, folder), *zip(*new)) if new else ():
                records.append(record)
                with open(out, 'a') as file:
                    print(json.dumps(record), file=file)
                bar.update()
        bar.close()

    tuning = itertools.product(ARMS, [TUNED_AT], TUNING_SEEDS, RATES, [1])
    run_all(list(tuning), 'choosing learning rates')
    chosen = choose_rates(records)
    runs = itertools.product(SEEDS, VIDEOS_PER_CLASS, ARMS)
    jobs = [(arm, count, seed, chosen[arm], 1) for seed, count, arm in runs]
    others = itertools.product(SEEDS, [share for share in SHARES if share != 1])
    jobs += [('joint', TUNED_AT, seed, chosen['joint'], share) for seed, share in others]
    run_all(jobs, 'comparing')

    print('learning rates: ' + ', '.join(f'{arm} {lr:g}' for arm, lr in chosen.items()))
    for title, header, rows in tables(records):
        bench.table(title, header, rows)
    plot(records, Path(args.plot))


def choose_rates(records: list[dict]) -> dict[str, float]:
    """For each way the learning rate with the best mean top-1 over the tuning seeds."""

    def mean(arm: str, lr: float) -> float:
        tried = [r['top1'] for r in records if (r['arm'], r['lr']) == (arm, lr) and r['seed'] in TUNING_SEEDS]
        return statistics.mean(tried)

    return {arm: max(RATES, key=functools.partial(mean, arm)) for arm in ARMS}


def results(records: list[dict], arm: str, count: int, metric: str = 'top1', share: float = 1) -> np.ndarray:
    """In %, of each seed in turn."""
    cell = (arm, count, share)
    found = {r['seed']: r[metric] for r in records if (r['arm'], r['videos_per_class'], r['share']) == cell}
    return np.array([100 * found[seed] for seed in SEEDS])


def interval(differences: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of their mean, by bootstrap over the seeds."""
    rng = data.generator('claim bootstrap')
    means = differences[rng.integers(len(differences), size=(10_000, len(differences)))].mean(1)
    return tuple(np.percentile(means, [2.5, 97.5]))


def tables(records: list[dict]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of what the README shows."""

    def spread(values: np.ndarray) -> str:
        return f'{values.mean():.1f} ± {values.std(ddof=1):.1f}'

    def difference(a: np.ndarray, b: np.ndarray) -> str:
        low, high = interval(a - b)
        return f'{(a - b).mean():+.1f} [{low:+.1f}, {high:+.1f}]'

    means, paired, shares = [], [], []
    for count in VIDEOS_PER_CLASS:
        top1 = {arm: results(records, arm, count) for arm in ARMS}
        looks = [spread(results(records, arm, count, 'looks')) for arm in ARMS]
        means.append([str(count), *map(spread, top1.values()), *looks])
        pairs = ('joint', 'images first'), ('joint', 'videos'), ('images first', 'videos')
        paired.append([str(count), *(difference(top1[a], top1[b]) for a, b in pairs)])
    for share in SHARES:
        top1 = results(records, 'joint', TUNED_AT, share=share)
        first = results(records, 'images first', TUNED_AT)
        shares.append([f'x {share:g}', spread(top1), difference(top1, first)])
    count = f'{HELD_OUT * len(PAIRS):,} held-out videos of {len(PAIRS)} classes'
    per = 'videos per class'
    return [
        (f'Top-1 on {count}, %, {len(SEEDS)} seeds', [per, *ARMS, *(f'{arm}: looks' for arm in ARMS)], means),
        ('Paired differences, points, 95 % interval', [per, *(f'{a} - {b}' for a, b in pairs)], paired),
        (f'Image loss, {TUNED_AT} {per}', ['image loss', 'joint', 'joint - images first'], shares),
    ]


def plot(records: list[dict], path: Path) -> None:
    """Left every run, a seed's three connected, with the means; right the paired differences."""
    from matplotlib import pyplot

    with pyplot.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'claim', 'font.family': 'sans-serif'}):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(9, 3.6), width_ratios=(3, 2), layout='constrained'
        )
        for group, count in enumerate(VIDEOS_PER_CLASS):
            top1 = [results(records, arm, count) for arm in ARMS]
            places = [4 * group + i for i in range(3)]
            left.plot(places, top1, color='gray', alpha=0.3, linewidth=0.8)
            for i, (place, values) in enumerate(zip(places, top1)):
                label = ARMS[i] if not group else None
                left.plot([place] * len(values), values, '.', color=f'C{i}', alpha=0.5)
                left.plot(
                    place, values.mean(), '_', color=f'C{i}', markersize=22, markeredgewidth=3, label=label
                )
            for i, (name, a, b) in enumerate((('joint − images first', 2, 1), ('joint − videos', 2, 0))):
                mean, ends = (top1[a] - top1[b]).mean(), interval(top1[a] - top1[b])
                error = [[mean - ends[0]], [ends[1] - mean]]
                right.errorbar(
                    group + 0.3 * i - 0.15,
                    mean,
                    error,
                    fmt='o',
                    color=('k', 'C0')[i],
                    capsize=4,
                    label=None if group else name,
                )
        left.axhline(100 / len(PAIRS), color='gray', linestyle=':', label='chance')
        left.axhline(25, color='gray', linestyle='--', linewidth=0.8, label='one frame at best')
        left.set(ylabel='top-1 on held-out videos, %', ylim=(0, 102))
        left.set_xticks([4 * group + 1 for group in range(3)], map(str, VIDEOS_PER_CLASS))
        right.axhline(0, color='gray', linewidth=0.8)
        right.set(ylabel='difference, points')
        right.set_xticks(range(3), map(str, VIDEOS_PER_CLASS))
        for axes in (left, right):
            axes.set_xlabel('training videos per class')
            axes.legend(frameon=False, fontsize='small')
        figure.savefig(path, metadata={'Date': None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0],
        epilog=__doc__.split('\n\n', 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    runs, picture = bench.ROOT / 'tests/reference/claim.jsonl', bench.ROOT / 'assets/claim.svg'
    parser.add_argument('--out', default=str(runs), help='every run (default: %(default)s)')
    parser.add_argument('--plot', default=str(picture), help='(default: %(default)s)')
    parser.add_argument(
        '--work-dir', default='work_dirs/claim', help='what images taught (default: %(default)s)'
    )
    parser.add_argument('--processes', type=int, default=os.cpu_count(), help='(default: %(default)s)')
    claim(parser.parse_args())


if __name__ == '__main__':
    main()
