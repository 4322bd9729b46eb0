"""What the network costs: parameters and FLOPs, per stage and in total.

    python flops.py                     the published accounting, then the joint model's own at 224 pixels
    python flops.py --size 112 --clip-len 16
    python flops.py --plan --cores 128  what a run takes, the recipe or your own, from measured rates

The published 54.75G FLOPs are the multiply-accumulates of the convolutions, plus 2 per element for every
BatchNorm, of one test view of 8x256x256. The published 32.45M parameters have a single linear layer
2048 -> 400 as the head: they are those of the plain SlowOnly, not of the joint model. Counting is done by
torch's own FLOP counter, which counts a multiply-accumulate as 2.
"""

import argparse
import math
import signal
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from model import OmniSlowOnly
from runtime.command import Parser, number


def count(network: OmniSlowOnly, x: torch.Tensor) -> dict[str, tuple[int, int]]:
    """{part: (multiply-accumulates, BatchNorm operations at 2 per element)} of a forward pass of `x`.

    The parts are the stem, the four stages and the head.
    """
    norms = Counter()

    def count_norm(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            norms[module] += 2 * output.numel()

    with register_module_forward_hook(count_norm), FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(x)
    flops = counter.get_flop_counts()
    parts = {part: (0, 0) for part in ('stem', 'layer1', 'layer2', 'layer3', 'layer4', 'head')}
    names = {'conv1': 'stem', 'bn1': 'stem', 'image_head': 'head', 'video_head': 'head'}
    for name, module in network.named_modules():
        top = name.split('.')[0]
        part = names.get(top, top)
        if part in parts and not any(module.children()):  # a module with children has their sum
            macs, norm_ops = parts[part]
            counted = sum(flops.get(f'{type(network).__name__}.{name}', {}).values())
            parts[part] = macs + counted // 2, norm_ops + norms[module]
    return parts


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def amount(value: float) -> str:
    return f'{value:,.0f}' if value >= 10 else f'{value:.2g}'


def plan(args: argparse.Namespace, clip: tuple[int, int], image: tuple[int, int]) -> None:
    """Print what a run of the recipe takes, with CPUs decoding what GPUs learn from."""
    epochs, steps, images_per_gpu = args.epochs, max(args.videos // (16 * args.gpus), 1), 85
    clips, pictures = (epochs * steps * args.gpus * count for count in (16, images_per_gpu))
    work = 3 * 2 * (clips * clip[0] + pictures * image[0])  # the backward pass costs two forward passes
    norms = 16 * clip[1] + images_per_gpu * image[1]  # activations, and so memory, grow with them
    gpu_hours = epochs * steps * args.step_ms / 3.6e6
    print(f'{epochs} epochs of {steps:,} steps on {args.gpus} GPUs')
    print(f'  a step     16 clips and {images_per_gpu} images on each GPU')
    print(
        f'  memory     {3.8e-9 * norms:.1f} GB of a GPU in fp32, {2e-9 * norms:.1f} GB in bf16 (from an H200)'
    )
    print(f'  images     each is seen {pictures / args.images:,.1f} times')
    print(f'  computed   {work / 1e18:,.3g} EFLOP (2 per multiply-accumulate, forward and backward)')
    print(f'  decoded    {clips / 1e6:,.3g}M clips of {args.clip_len} frames, {pictures / 1e6:,.3g}M images')
    print(f'  GPUs       {amount(gpu_hours)} hours at {args.step_ms:g} ms a step (--step-ms)')
    print(f'\n  {"the files":26}{"as they are":>20}{"after encode":>20}')

    def row(title: str, unit: str, values: Iterable[float]) -> None:
        print(f'  {title:26}' + ''.join(f'{f"{amount(value)} {unit}":>20}' for value in values))

    terabytes = [(clips * v + pictures * i) / 1e6 for v, i in zip(args.video_mb, args.image_mb)]
    core_hours = [(clips * v + pictures * i) / 3.6e6 for v, i in zip(args.clip_ms, args.image_ms)]
    row('read, if nothing is cached', 'TB', terabytes)
    row('decoding takes', 'core hours', core_hours)
    row('to keep the GPUs busy', 'cores', [math.ceil(hours / gpu_hours) for hours in core_hours])
    for cores in sorted({16, 32, 64, 128, args.cores}):
        row(f'a run on {cores} cores', 'hours', [max(gpu_hours, hours / cores) for hours in core_hours])


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add, whole, above_0 = parser.add_argument, number(int, 1), number(float, 0, above=True)
    add('--size', type=whole, default=224, help='side of the crop (default: %(default)s)')
    add('--clip-len', type=whole, default=8, help='frames of a clip (default: %(default)s)')
    add('--width', type=whole, default=64, help='channels of the stem (default: %(default)s)')
    blocks = 'blocks per stage (default: 3 4 6 3, a ResNet-50)'
    add('--layers', type=whole, nargs=4, default=(3, 4, 6, 3), metavar='N', help=blocks)
    add('--plan', action='store_true', help='what training takes, from these rates:')
    add('--videos', type=whole, default=240_435, help='training videos (default: those of Kinetics-400)')
    add('--images', type=whole, default=1_281_167, help='training images (default: those of ImageNet)')
    add('--epochs', type=whole, default=256, help='passes over the videos (default: %(default)s)')
    add('--gpus', type=whole, default=8, help='GPUs (default: %(default)s)')
    add('--cores', type=whole, default=96, help='CPU cores for decoding (default: %(default)s)')
    step = 'a step of 16 clips and 85 images on one GPU: `tests/bench.py step` (default: 53, an H200 in bf16)'
    add('--step-ms', type=above_0, default=53, help=step)
    for flag, default, unit in (
        ('--clip-ms', (42, 8.4), 'CPU time from a video to a training clip: `tests/bench.py clip`'),
        ('--image-ms', (1.3, 0.6), 'CPU time from a JPEG to a training image'),
        ('--video-mb', (0.6, 0.9), 'mean size of a video'),
        ('--image-mb', (0.11, 0.03), 'mean size of an image'),
    ):
        text = f'{unit}, before and after `prepare.py encode` (default: {default[0]} {default[1]})'
        add(flag, type=above_0, nargs=2, default=default, metavar=('BEFORE', 'AFTER'), help=text)
    args = parser.parse_args(argv)
    with torch.device('meta'):
        network = OmniSlowOnly(layers=args.layers, width=args.width)
        sizes = (8, 256, 256), (args.clip_len, args.size, args.size), (args.size, args.size)
        test_view, clip, image = (torch.empty(1, 3, *size) for size in sizes)
        plain = parameters(nn.Linear(32 * args.width, 400))

    if args.plan:
        plan(args, *(tuple(map(sum, zip(*count(network, x).values()))) for x in (clip, image)))
        return

    counted = count(network, test_view)
    convs, norms = (sum(pair[i] for part, pair in counted.items() if part != 'head') for i in (0, 1))
    backbone = parameters(network) - parameters(network.image_head) - parameters(network.video_head)
    print('As published (multiply-accumulates, BatchNorm as 2 per element, 8x256x256, one linear head)')
    print(f'  FLOPs       {(convs + norms) / 1e9:.2f}G   = convolutions {convs:,} + BatchNorm {norms:,}')
    print(f'  parameters  {(backbone + plain) / 1e6:.2f}M   = backbone {backbone:,} + head {plain:,}\n')
    print(f'The joint model: {parameters(network) / 1e6:.2f}M parameters = backbone {backbone:,}', end='')
    print(
        f' + image head {parameters(network.image_head):,} + video head {parameters(network.video_head):,}\n'
    )
    for kind, x in (('clip', clip), ('image', image)):
        title = f'{kind} {"x".join(map(str, x.shape[2:]))}'
        print(f'{title:18} {"multiply-accumulates":>22} {"BatchNorm":>14}')
        counted = count(network, x)
        for part, (macs, norms) in [*counted.items(), ('total', tuple(map(sum, zip(*counted.values()))))]:
            print(f'  {part:16} {macs:22,} {norms:14,}')
        print()


if __name__ == '__main__':
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `flops.py | head`
    main()
