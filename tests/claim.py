"""Does joint training help? Train on few videos in three ways, and compare top-1 on held-out videos.

    python tests/claim.py                     go on from the recorded runs; with all of them, print and plot
    python tests/claim.py --out mine.jsonl    make all runs again

A video is one cluttered scene that alternates between two looks out of eight, and its class is which two: 16
of the 28 pairs, each look in four of them, so that who sees one frame is right 25 % of the time at best. Some
looks are plain, others faint, so that the first are learned from few videos and the others from more. An
image shows a look in another style, grey, plain and without clutter, and its class is the look: one of four,
so that of each pair one has to be learned from videos. Pictures are drawn in memory; network, sampling,
augmentation, schedule and `train_step` are the program's own.

From scratch on videos; on images first and then on videos; jointly. Each way takes the same number of video
steps and has, for each number of videos, the best of four learning rates, chosen by seeds of their own;
images first sees as many images before as joint training does along the way. A seed's videos are the same for
all three, so they are compared in pairs. Every run is a line of --out; what stands there is not run again, so
other settings need another --out and --work-dir.
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
RATES = (0.05, 0.1, 0.2, 0.4)
STEPS, BATCH = 600, {'video': 32, 'image': 32}
# What else is tried with MIDDLE videos per class: shares of the image loss in joint training, and more steps.
MIDDLE, SHARES, LONGER = 4, (0.5, 1, 2), STEPS * 3 // 2

LOOKS = ('stripes', 'bars', 'lattice', 'dots', 'zigzag', 'braids', 'rings', 'grid')
PAIRS = [(look, (look + apart) % 8) for look in range(8) for apart in (1, 3)]  # the classes of videos
SEEN = (0, 2, 4, 6)  # the looks that images show, their classes: one of each pair
CONTRAST = (1, 0.8, 0.62, 0.5, 0.39, 0.31, 0.25, 0.2)  # of each look in videos; in images 1
# What makes it hard was set by trials on videos only, how few images there are by trials of images first; the
# README tells how, and of the setting before this one.
SIDE, SIZE, CLUTTER = 48, 42, 20  # pixels of a picture and of its crop; levels
IMAGES_PER_LOOK, HELD_OUT = 8, 64  # the latter of each class
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


def learn(network: OmniSlowOnly, sets: dict[str, Videos | Images], lr: float, seed: int, steps: int) -> None:
    """So many steps of train.py on these sets."""
    optimizer = train.make_optimizer(network, lr, 0.9, 1e-4)
    scaler, device = torch.amp.GradScaler('cpu', enabled=False), torch.device('cpu')
    for own in sets.values():
        own.seed = seed
    samples = data.JointDataset(sets)
    sizes = {source: len(own) for source, own in sets.items()}
    sampler = data.JointSampler(sizes, {source: BATCH[source] for source in sets}, seed=seed)
    network.train()
    for step in range(steps):
        batch = data.collate([samples[key] for key in sampler.batch(step)])
        for group in optimizer.param_groups:
            group['lr'] = train.learning_rate(step, 1, lr, round(steps * 34 / 256), steps)
        dropout = data.generator('dropout', seed, step).integers(2**62).item()
        train.train_step(network, optimizer, scaler, [batch], [dropout], device, clip_norm=1)


def predict(network: OmniSlowOnly, source: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The class that each sample of a held-out set is taken for, and its own."""
    scores, labels, _ = evaluate.predict(
        network, source, make_set(source, 'val', seed, HELD_OUT), batch_size=16
    )
    return scores.argmax(1), labels


def new_network(seed: int, videos: bool = True, images: bool = True) -> OmniSlowOnly:
    torch.manual_seed(seed)
    return OmniSlowOnly(videos * len(PAIRS), images * len(SEEN), **NETWORK)


def image_network(folder: Path, seed: int, lr: float, steps: int) -> OmniSlowOnly:
    """The network that has learned from images alone; the same for every number of videos, so it is kept."""
    network, path = new_network(seed, videos=False), folder / f'images_{seed}_{lr:g}_{steps}.pth'
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network
    learn(network, {'image': make_set('image', 'train', 0, IMAGES_PER_LOOK)}, lr, seed, steps)
    part = path.with_suffix(f'.{os.getpid()}')  # two processes may be at it
    torch.save(network.state_dict(), part)
    os.replace(part, path)
    return network


def run(folder: Path, arm: str, count: int, seed: int, lr: float, share: float, steps: int) -> dict:
    """Train in one way; what the network has learned."""
    start = time.process_time()
    torch.set_num_threads(1)  # the same numbers on any number of cores
    network = new_network(seed, images=arm == 'joint')
    sets = {'video': make_set('video', 'train', seed, count)}
    if arm == 'joint':
        sets['image'] = make_set('image', 'train', 0, IMAGES_PER_LOOK)
        if share != 1:  # scales the gradients of the image loss; the logits stay as they are
            network.image_head.register_forward_hook(
                lambda head, inputs, logits: share * logits + (1 - share) * logits.detach()
            )
    if arm == 'images first':  # as --init-2d does
        weights = image_network(folder, seed, lr, steps).state_dict()
        network.load_state_dict(checkpoint.inflate_2d(weights, network), strict=False)
    learn(network, sets, lr, seed, steps)

    predicted, labels = predict(network, 'video', int(seed in SEEDS))  # others than rates are chosen by
    right = [{*PAIRS[a]} & {*PAIRS[b]} for a, b in zip(predicted, labels)]
    result = {'top1': np.mean(predicted == labels), 'looks': np.mean([len(both) / 2 for both in right])}
    result['seen_looks'] = np.mean([len(both & {*SEEN}) for both in right])  # of those that images show
    if arm != 'videos':
        network = network if arm == 'joint' else image_network(folder, seed, lr, steps)  # before its videos
        predicted, labels = predict(network, 'image')
        result['image_top1'] = np.mean(predicted == labels)
    job = {'arm': arm, 'videos_per_class': count, 'seed': seed, 'lr': lr, 'share': share, 'steps': steps}
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
        keys = ('arm', 'videos_per_class', 'seed', 'lr', 'share', 'steps')
        known = {tuple(record[key] for key in keys) for record in records}
        new = [job for job in dict.fromkeys(jobs) if job not in known]
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context('spawn')) as pool:
            done = pool.map(functools.partial(run, folder), *zip(*new)) if new else ()
            for record in tqdm(done, title, len(new), unit='run', disable=not new):
                records.append(record)
                with open(out, 'a') as file:
                    print(json.dumps(record), file=file)

    ways = list(itertools.product(VIDEOS_PER_CLASS, ARMS))
    tuning = itertools.product(ways, TUNING_SEEDS, RATES)
    run_all([(arm, n, seed, lr, 1, STEPS) for (n, arm), seed, lr in tuning], 'choosing learning rates')
    chosen = {
        (n, arm): max(RATES, key=lambda lr: results(records, arm, n, lr=lr).mean())  # noqa: B023
        for n, arm in ways
    }
    jobs = [(arm, n, seed, chosen[n, arm], 1, STEPS) for seed in SEEDS for n, arm in ways]
    lr = chosen[MIDDLE, 'joint']
    jobs += [('joint', MIDDLE, seed, lr, share, STEPS) for seed in SEEDS for share in SHARES]
    jobs += [(arm, MIDDLE, seed, chosen[MIDDLE, arm], 1, LONGER) for seed in SEEDS for arm in ARMS]
    run_all(jobs, 'comparing')

    for n in VIDEOS_PER_CLASS:
        print(
            f'learning rates, {n} videos per class: ' + ', '.join(f'{arm} {chosen[n, arm]:g}' for arm in ARMS)
        )
    for title, header, rows in tables(records):
        bench.table(title, header, rows)
    plot(records, Path(args.plot))


def results(
    records: list[dict], arm: str, count=MIDDLE, metric='top1', share=1, steps=STEPS, lr=None
) -> np.ndarray:
    """In %, of each seed in turn; with `lr` of the seeds that choose it."""
    wanted = {'arm': arm, 'videos_per_class': count, 'share': share, 'steps': steps}
    wanted |= {'lr': lr} if lr else {}
    found = {r['seed']: 100 * r[metric] for r in records if wanted.items() <= r.items()}
    return np.array([found[seed] for seed in (TUNING_SEEDS if lr else SEEDS)])


def interval(differences: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of their mean, by the bootstrap-t over the seeds (Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993, chapter 12): plain percentiles of the means of ten seeds would cover
    89 %."""
    rng = data.generator('claim bootstrap')
    drawn = differences[rng.integers(len(differences), size=(10_000, len(differences)))]
    t = (drawn.mean(1) - differences.mean()) / drawn.std(1)
    return tuple(differences.mean() - np.percentile(t, [97.5, 2.5]) * differences.std())


def tables(records: list[dict]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of what the README shows."""

    def spread(arm: str, *which) -> str:
        values = results(records, arm, *which)
        return f'{values.mean():.1f} ± {values.std(ddof=1):.1f}'

    def difference(a: np.ndarray, b: np.ndarray) -> str:
        low, high = interval(a - b)
        return f'{(a - b).mean():+.1f} [{low:+.1f}, {high:+.1f}]'

    top1, looks, paired, shares, longer = [], [], [], [], []
    pairs = ('joint', 'images first'), ('joint', 'videos'), ('images first', 'videos')
    for n in VIDEOS_PER_CLASS:
        top1.append([str(n), *(spread(arm, n) for arm in ARMS)])
        looks.append([str(n), *(spread(arm, n, 'looks') for arm in ARMS)])
        paired.append([str(n), *(difference(*(results(records, arm, n) for arm in pair)) for pair in pairs)])
    for share in SHARES:
        both = results(records, 'joint', share=share), results(records, 'images first')
        shares.append([f'x {share:g}', spread('joint', MIDDLE, 'top1', share), difference(*both)])
    for steps in (STEPS, LONGER):
        both = [results(records, arm, steps=steps) for arm in pairs[0]]
        cells = [spread(arm, MIDDLE, 'top1', 1, steps) for arm in ARMS]
        longer.append([str(steps), *cells, difference(*both)])
    per = 'videos per class'
    return [
        (f'Top-1 on held-out videos, %, of {len(SEEDS)} seeds', [per, *ARMS], top1),
        ('Looks named rightly, %', [per, *ARMS], looks),
        ('Paired differences of top-1, 95 % interval', [per, *(f'{a} - {b}' for a, b in pairs)], paired),
        (f'{MIDDLE} {per}', ['image loss', 'joint', 'joint - images first'], shares),
        (f'{MIDDLE} {per}', ['steps', *ARMS, 'joint - images first'], longer),
    ]


def plot(records: list[dict], path: Path) -> None:
    """Left every run, a seed's three connected, and the means; right the mean paired differences."""
    from matplotlib import pyplot

    with pyplot.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'claim', 'font.family': 'sans-serif'}):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(9, 3.6), width_ratios=(3, 2), layout='constrained'
        )
        for group, count in enumerate(VIDEOS_PER_CLASS):
            top1 = np.array([results(records, arm, count) for arm in ARMS])
            places = 4 * group + np.arange(3)
            left.plot(places, top1, color='gray', alpha=0.3, linewidth=0.8)
            for i, place in enumerate(places):
                left.plot([place] * len(SEEDS), top1[i], '.', color=f'C{i}', alpha=0.5)
                bar = {'marker': '_', 'markersize': 22, 'markeredgewidth': 3, 'linestyle': ''}
                left.plot(place, top1[i].mean(), color=f'C{i}', label=None if group else ARMS[i], **bar)
            for a, b, colour in ((2, 1, 'black'), (2, 0, 'C0')):
                mean, (low, high) = (top1[a] - top1[b]).mean(), interval(top1[a] - top1[b])
                style = {'color': colour, 'label': None if group else f'joint − {ARMS[b]}'}
                place = group + 0.15 * (1 - 2 * b)
                right.errorbar(place, mean, [[mean - low], [high - mean]], fmt='o', capsize=4, **style)
        left.axhline(25, color='gray', linestyle='--', linewidth=0.8, label='one frame at best')
        left.axhline(100 / len(PAIRS), color='gray', linestyle=':', label='chance')
        left.set(ylabel='top-1 on held-out videos, %', ylim=(0, 102))
        left.set_xticks([1, 5, 9], map(str, VIDEOS_PER_CLASS))
        right.axhline(0, color='gray', linewidth=0.8)
        right.set(ylabel='paired difference, points (95 %)')
        right.set_xticks(range(3), map(str, VIDEOS_PER_CLASS))
        for axes in (left, right):
            axes.set_xlabel('training videos per class')
        figure.legend(loc='outside upper center', ncols=7, frameon=False, fontsize='small')
        figure.savefig(path, metadata={'Date': None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0],
        epilog=__doc__.split('\n\n', 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
