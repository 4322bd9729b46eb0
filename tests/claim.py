"""Does joint training help? Train on few videos in three ways, and compare top-1 on held-out videos.

    python tests/claim.py                     go on from the recorded runs; with all of them, print and plot
    python tests/claim.py --out mine.jsonl    make all 70 runs again: 70 minutes on two cores

From scratch on videos; on images first and then on videos; jointly. Each run is a command of train.py, with
the same network, number of video steps and schedule; each of five seeds has videos and first weights of its
own. Each way has the best of three learning rates, chosen at 4 videos per class by two more seeds on further
videos. Every run is a line of --out; what stands there is not run again.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bench  # which has Python find the project's modules, too
import torch
from tqdm import tqdm

import prepare
import train

ARMS = ('videos', 'images first', 'joint')
VIDEOS_PER_CLASS = (1, 4, 16)
SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (5, 6)  # each has videos of its own
RATES, TUNED_AT = (0.025, 0.05, 0.1), 4
CLUTTER = 90  # levels; chosen by videos only, such that they lie between chance and perfect
STEPS, CLIPS, IMAGES = 768, 8, 32  # video steps of every run, and its batches


def claim(args: argparse.Namespace) -> None:
    """Make the runs that are not recorded yet, print the table, draw the plot."""
    bench.need('matplotlib', 'matplotlib')  # before hours of training, not after them
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
    bench.table(
        f'Top-1 on 256 held-out videos of 8 classes, %: mean and standard deviation of {len(SEEDS)} seeds',
        ['videos per class', *ARMS, "joint's images"],
        rows,
    )
    print('  learning rates: ' + ', '.join(f'{arm} {lr:g}' for arm, lr in chosen.items()))
    plot_claim(results, Path(args.plot))


def make_claim_data(folder: Path) -> None:
    """Videos and images below `folder`, and a list of training videos for each seed and number of them."""
    prepare.make_demo(folder / 'data', train_videos=144, val_videos=32, train_images=256, clutter=CLUTTER)
    # one of each of the eight classes in turn
    lines = (folder / 'data/video_train.txt').read_text().splitlines()
    for seed, count in itertools.product(SEEDS + TUNING_SEEDS, VIDEOS_PER_CLASS):
        own = lines[8 * 16 * seed :][: 8 * count]
        (folder / f'train_{count}_{seed}.txt').write_text('\n'.join(own))
    (folder / 'choose.txt').write_text('\n'.join(lines[8 * 112 :]))


def train_arm(folder: Path, arm: str, count: int, seed: int, lr: float) -> dict:
    """One run of train.py; what it measured at its end. A run that was broken off goes on."""
    name = f'{arm}_{count}_{seed}_{lr:g}'.replace(' ', '_')
    samples, batch = (1024, IMAGES) if arm == 'images' else (8 * count, CLIPS)
    epochs = str(STEPS * batch // samples)
    line = [sys.executable, str(bench.ROOT / 'train.py'), '--work-dir', str(folder / name), '--resume']
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
        sys.exit(f'claim.py: {" ".join(line)}\n{done.stderr}')
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
    runs, plot = bench.ROOT / 'tests/reference/claim.jsonl', bench.ROOT / 'assets/claim.svg'
    parser.add_argument('--out', default=str(runs), help='every run (default: %(default)s)')
    parser.add_argument('--plot', default=str(plot), help='(default: %(default)s)')
    parser.add_argument('--work-dir', default='work_dirs/claim', help='about 300 MB (default: %(default)s)')
    claim(parser.parse_args())


if __name__ == '__main__':
    main()
