"""Measure a checkpoint on a validation set, or name what a file shows.

    python evaluate.py --ckpt work_dirs/omni/best.pth --dump result.pkl     10 clips x 3 crops, top-1, top-5
    python evaluate.py --ckpt work_dirs/omni/best.pth --images              the image set instead
    python evaluate.py --ckpt work_dirs/omni/best.pth --show wrong.png      and draw the surest mistakes
    python evaluate.py --ckpt work_dirs/omni/best.pth clip.mp4 photo.jpg    five likeliest labels of each file
    torchrun --nproc_per_node=8 evaluate.py --ckpt work_dirs/omni/best.pth  on eight GPUs

Lists, label names and the input's size come from the checkpoint; an official MMAction2 checkpoint has none of
them and is taken as the published recipe. Runs on a GPU where there is one, else on the CPU.
"""

import argparse
import os
import pickle
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import data
import model as models

# the published validation set; used where neither the command nor the checkpoint names another
VAL_LIST = 'data/kinetics400/kinetics400_val_list_videos.txt'
VAL_ROOT = 'data/kinetics400/videos_val'
IMAGE_VAL_LIST = 'data/imagenet/meta/val.txt'
IMAGE_VAL_ROOT = 'data/imagenet/val'

# Pixels of all frames in one forward pass. A CPU is fastest with small ones, two views of 8x256x256, as large
# tensors cost it page faults; a GPU wants more, and 16 such views take about 3 GB in fp32.
PIXELS_PER_PASS = {'cpu': 2**20, 'cuda': 2**23}


# ----------------------------------------------------------------------------------------------------------
# Scores and metrics
# ----------------------------------------------------------------------------------------------------------


def accuracy(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores (N, classes) and labels (N,) -> {'top1', 'top5', 'mean1'}, fractions of 1.

    mean1 is the mean over the classes of each one's own top-1 accuracy. As in MMAction2, a class that is
    predicted but never occurs counts with 0.
    """
    ranked = np.argsort(scores, axis=1)[:, ::-1]
    hits = ranked == np.asarray(labels)[:, None]
    seen = np.union1d(labels, ranked[:, 0])
    per_class = [hits[labels == label, 0].mean() if (labels == label).any() else 0.0 for label in seen]
    return {
        'top1': float(hits[:, 0].mean()),
        'top5': float(hits[:, :5].any(1).mean()),
        'mean1': float(np.mean(per_class)),
    }


def class_name(names: list[str] | None, label: int) -> str:
    """What to call a class, with or without a label map."""
    return names[label] if names else f'class {label}'


def confusions(scores: np.ndarray, labels: np.ndarray, names: list[str] | None, count: int = 5) -> list[str]:
    """A line for each of the classes with most errors: how many, and what it is mostly taken for."""
    predicted = scores.argmax(1)
    readable = scores[np.arange(len(labels)), labels] >= 0
    wrong = readable & (predicted != labels)
    errors = np.bincount(labels[wrong], minlength=scores.shape[1])
    lines = []
    for label in np.argsort(-errors, kind='stable')[:count]:
        if errors[label]:
            taken = np.bincount(predicted[wrong & (labels == label)], minlength=scores.shape[1])
            likeliest = [other for other in np.argsort(-taken, kind='stable')[:3] if taken[other]]
            shown = ', '.join(f'{class_name(names, i)} ({taken[i]})' for i in likeliest)
            total = (readable & (labels == label)).sum()
            lines.append(f'{class_name(names, label)}: {errors[label]} of {total} wrong, taken for {shown}')
    return lines


@torch.inference_mode()
def score_views(network: nn.Module, views: torch.Tensor, precision: str) -> torch.Tensor:
    """Views (V, 3, T, H, W) or (V, 3, H, W) of any number of samples -> their softmax scores, float32 (V,
    classes)."""
    device = next(network.parameters()).device
    scores = []
    for part in views.split(max(1, PIXELS_PER_PASS[device.type] // views[0, 0].numel())):
        with autocast(device, precision):
            logits = network(part.to(device, non_blocking=True))
        scores.append(logits.float().softmax(1))
    return torch.cat(scores).cpu()


def predict(
    network: nn.Module,
    dataset: data.VideoDataset | data.ImageDataset,
    precision: str = 'fp32',
    batch_size: int = 1,
    workers: int = 0,
    progress: str = '',
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Scores of a whole 'val' or 'test' dataset, the mean over each sample's views.

    Returns scores float32 (N, classes), labels int64 (N,) in the dataset's order, and a line for each
    unreadable file; such a file counts as wrong: its own label scores -1, all others 0. Under torchrun every
    rank takes its share and all return the whole.
    """
    network = models.fold_batchnorm(network, is_image=isinstance(dataset, data.ImageDataset))
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = range(rank, len(dataset), world_size)
    loader = DataLoader(
        Subset(dataset, share),
        batch_size,
        num_workers=workers,
        worker_init_fn=data.leave_signals_to_main,
        collate_fn=list,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=2 if workers else None,
    )
    rows, bad = [], []
    for items in tqdm(loader, desc=progress, unit='batch', disable=None if progress and rank == 0 else True):
        good = [item for item in items if item.pixels is not None]
        scores = iter(())
        if good:
            views = torch.cat([item.pixels for item in good])
            scores = iter(
                score_views(network, views, precision).unflatten(0, (len(good), -1)).mean(1).numpy()
            )
        rows += [(item.label, next(scores) if item.pixels is not None else None) for item in items]
        bad += [line for item in items for line in item.bad]

    shares = [None] * world_size
    if world_size > 1:
        dist.all_gather_object(shares, (rows, bad))
    else:
        shares = [(rows, bad)]
    rows = [None] * len(dataset)
    for r, (part, _) in enumerate(shares):
        rows[r::world_size] = part
    labels = np.array([label for label, _ in rows])
    if all(row is None for _, row in rows):
        raise ValueError(f'none of the {len(rows)} files can be read, the first one {shares[0][1][0]}')
    scores = np.zeros((len(rows), len(next(row for _, row in rows if row is not None))), dtype=np.float32)
    for i, (label, row) in enumerate(rows):
        if row is None:
            scores[i, label] = -1
        else:
            scores[i] = row
    return scores, labels, [line for _, lines in shares for line in lines]


# ----------------------------------------------------------------------------------------------------------
# Where and how to compute; also used by train.py
# ----------------------------------------------------------------------------------------------------------


def pick_device() -> torch.device:
    """This process's own GPU where there is one, else the CPU; joins the other processes under torchrun."""
    on_gpu = torch.cuda.is_available()
    device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0))) if on_gpu else torch.device('cpu')
    if on_gpu:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = (
            True  # "fp32" on a GPU is TF32, as convolutions have it by default
        )
    if 'RANK' in os.environ:
        # gloo carries what lies on the CPU (flags, scores), so that no GPU has to be waited for
        backend = 'cpu:gloo,cuda:nccl' if on_gpu else 'gloo'
        store, rank, world_size = next(dist.rendezvous('env://'))
        if os.environ.get('GROUP_WORLD_SIZE') == '1':
            # torchrun keeps this store when it restarts the processes, which must not meet the old ones' keys
            # (pytorch issue 135712). On several nodes the counts may differ; the README says what helps.
            store = dist.PrefixStore(f'start {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return device


def pick_precision(asked: str | None, device: torch.device) -> tuple[str, str]:
    """(precision, why): what was asked for, else bf16 on GPUs that compute in it, else fp32."""
    if asked:
        return asked, 'as asked'
    if device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False):
        return 'bf16', 'this GPU computes in it'
    return 'fp32', "the CPU's default" if device.type == 'cpu' else 'this GPU has no bf16'


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for a forward pass; nothing with fp32."""
    dtype = torch.float16 if precision == 'fp16' else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != 'fp32')


def default_workers() -> int:
    """Loader processes for this process: its share of the cores, at most 12 (as many as the reference
    starts)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(1, min(12, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def build(checkpoint: dict, path: str) -> models.OmniSlowOnly:
    """The network of a checkpoint, its size read off the weights, in eval mode."""
    state = checkpoint['model']
    count = [
        1 + max((int(k.split('.')[1]) for k in state if k.startswith(f'layer{s}.')), default=-1)
        for s in range(1, 5)
    ]
    if 'conv1.weight' not in state or 0 in count:
        raise ValueError(f'{path}: not a SlowOnly network: it has no conv1.weight or lacks a stage')
    classes = {}
    for head, last in (('video', 'video_head.4.weight'), ('image', 'image_head.2.weight')):
        classes[f'{head}_classes'] = len(state[last]) if last in state else 0
    network = models.OmniSlowOnly(**classes, layers=tuple(count), width=len(state['conv1.weight']))
    models.load_into(network, state, path)
    return network.eval()


def write_dump(path: str, scores: np.ndarray, labels: np.ndarray, size: int) -> None:
    """Write MMAction2's result file: a pickled list, in dataset order, of dicts of tensors."""
    results = [
        {
            'pred_score': torch.from_numpy(row.copy()),
            'pred_label': torch.tensor([int(row.argmax())]),
            'gt_label': torch.tensor([int(label)]),
            'num_classes': scores.shape[1],
            'img_shape': (size, size),
        }
        for row, label in zip(scores, labels)
    ]
    with open(path, 'wb') as file:
        pickle.dump(results, file)


def show_mistakes(
    out: str,
    dataset: data.VideoDataset | data.ImageDataset,
    scores: np.ndarray,
    labels: np.ndarray,
    names: list[str] | None,
) -> int:
    """Draw, as a PNG, the eight wrongly classified samples whose wrong label scores highest, each one under
    both labels and their scores. `dataset` is a 'val' one: of a video its middle clip is drawn. Returns how
    many there are to draw; with none, nothing is written."""
    predicted, rows, titles = scores.argmax(1), [], []
    own, highest = scores[np.arange(len(labels)), labels], scores.max(1)
    wrong = np.flatnonzero((predicted != labels) & (own >= 0))  # an unreadable one has -1
    for i in wrong[np.argsort(-highest[wrong], kind='stable')][:8]:
        pixels = dataset[int(i)].pixels[0]  # (3, T, H, W) or (3, H, W)
        rows.append(pixels.transpose(0, 1) if pixels.ndim == 4 else pixels.unsqueeze(0))
        right, taken = (class_name(names, label) for label in (labels[i], predicted[i]))
        file = os.path.basename(dataset.samples.path(i))
        titles.append(f'{file}: {right} ({own[i]:.0%}) taken for {taken} ({highest[i]:.0%})')
    if rows:
        data.draw_rows(out, rows, titles, 112)
    return len(rows)


def check_writable(path: str) -> None:
    """Raise OSError now if `path` cannot be written later; leaves an existing file as it is."""
    existed = os.path.exists(path)
    open(path, 'ab').close()
    if not existed:
        os.remove(path)


def classify(network: nn.Module, path: str, settings: dict, names: dict, precision: str) -> str:
    """The five likeliest labels of a video or image file, as text."""
    if data.IMAGE_SUFFIX.search(path):
        kind, dataset = 'image', data.ImageDataset(None, 'val', settings['size'])
    else:
        kind, dataset = 'video', data.VideoDataset(None, 'test', **settings)
    if getattr(network, f'{kind}_head') is None:
        raise ValueError(f'this checkpoint has no head for {kind}s')
    scores = score_views(network, dataset.load(path, None), precision).mean(0)
    lines = [f'{path} ({kind})']
    for score, label in zip(*scores.topk(min(5, len(scores)))):
        lines.append(f'  {score:7.2%}  {class_name(names[kind], label)}')
    return '\n'.join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0],
        epilog=__doc__.split('\n\n', 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('files', nargs='*', metavar='FILE', help='videos or images to classify instead of measuring a set')
    add('--ckpt', required=True, help='a checkpoint of train.py, or an official one')
    add('--dump', metavar='PKL', help="write scores and labels in the format of MMAction2's result.pkl")
    add('--show', metavar='PNG', help='draw the surest of the wrongly classified clips, with their scores')
    add('--images', action='store_true', help='measure the image set, one centre crop each')
    add(
        '--val-list',
        help='list or folder of class folders of videos or, with --images, images; default: the one that the '
        'checkpoint was trained with',
    )
    add('--val-root', help="folder that the list's paths are below; default: the checkpoint's")
    add('--clips', type=data.positive, default=10, help='clips spread over each video (default: %(default)s)')
    add('--crops', type=int, choices=(1, 3), default=3, help='crops of each clip (default: %(default)s)')
    add('--precision', choices=('fp32', 'bf16', 'fp16'), help='default: bf16 on a GPU that has it, else fp32')
    add('--workers', type=int, help='loader processes; default: one per core, at most 12')
    args = parser.parse_args(argv)
    if args.files and (args.dump or args.show or args.val_list):
        parser.error('--dump, --show and --val-list measure a set; they do not go with files to classify')
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = pick_device()
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    show = print if is_main else lambda *_, **__: None
    try:
        for path in filter(None, (args.dump, args.show)) if is_main else ():
            check_writable(path)
        checkpoint = models.load_checkpoint(args.ckpt)
        network = build(checkpoint, args.ckpt).to(device)
        saved = checkpoint.get('settings', {})
        settings = {key: saved[key] for key in ('size', 'clip_len', 'frame_interval') if key in saved}
        names = {kind: checkpoint.get(f'{kind}_labels') for kind in ('video', 'image')}
        precision, why = pick_precision(args.precision, device)
        show(f'{args.ckpt}: computing in {precision} ({why}) on {device}')
        state = checkpoint['model']
        if network.image_head and torch.equal(state['bn1.image_running_mean'], state['bn1.running_mean']):
            show('no image statistics in this checkpoint: images are normalized with those of the videos')

        if args.files:
            settings.update(num_clips=args.clips, num_crops=args.crops)
            failed = 0
            for path in args.files:
                try:
                    show(classify(network, path, {'size': 224, **settings}, names, precision))
                except (OSError, ValueError, RuntimeError) as error:
                    failed += 1
                    print(f'evaluate.py: {path}: {data.one_line(error)}', file=sys.stderr)
            sys.exit(1 if failed else 0)

        kind = 'image' if args.images else 'video'
        if getattr(network, f'{kind}_head') is None:
            raise ValueError(f'{args.ckpt}: this checkpoint has no head for {kind}s')
        prefix, published = (
            ('image_val', (IMAGE_VAL_LIST, IMAGE_VAL_ROOT)) if args.images else ('val', (VAL_LIST, VAL_ROOT))
        )
        val_list = args.val_list or saved.get(f'{prefix}_list', published[0])
        val_root = saved.get(f'{prefix}_root', published[1]) if args.val_root is None else args.val_root
        if not os.path.exists(val_list):
            raise FileNotFoundError(
                f'{val_list}: no such file; run this in the folder of the training, or name a list with '
                '--val-list and its folder with --val-root'
            )
        classes = getattr(network, f'{kind}_head')[-1].out_features
        samples = data.read_list(val_list, val_root, classes, not args.images, names[kind])
        if os.path.isdir(val_list):
            names[kind] = names[kind] or data.class_names(val_list)
        if args.images:
            dataset = data.ImageDataset(samples, 'val', settings.get('size', 224))
        else:
            dataset = data.VideoDataset(
                samples, 'test', **settings, num_clips=args.clips, num_crops=args.crops
            )
        workers = default_workers() if args.workers is None else args.workers
        scores, labels, bad = predict(
            network, dataset, precision, 16 if args.images else 1, workers, f'{len(dataset)} {kind}s'
        )
    except (OSError, ValueError) as error:
        show(f'evaluate.py: {error}', file=sys.stderr)
        sys.exit(1)
    finally:
        data.end_workers()
    for line in bad:
        show(f'unreadable, counted as wrong: {line}', file=sys.stderr)
    result = accuracy(scores, labels)
    views = 'centre crop' if args.images else f'{args.clips} clips x {args.crops} crops'
    show(f'{len(dataset)} {kind}s, {views}' + (f', {len(bad)} of them unreadable' if bad else ''))
    show(f'top-1 {result["top1"]:.2%}   top-5 {result["top5"]:.2%}   mean class {result["mean1"]:.2%}')
    if mistakes := confusions(scores, labels, names[kind]):
        show('most errors:\n  ' + '\n  '.join(mistakes))
    if args.dump and is_main:
        write_dump(args.dump, scores, labels, dataset.size if args.images else dataset.short_side)
        print(f'wrote {args.dump}')
    if args.show and is_main:
        drawn = dataset if args.images else data.VideoDataset(samples, 'val', **settings)
        count = show_mistakes(args.show, drawn, scores, labels, names[kind])
        print(f'wrote {args.show}, {count} mistakes' if count else 'no mistakes to show')
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == '__main__':
    main()
