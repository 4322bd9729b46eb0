"""What the network costs: parameters and FLOPs, per stage and in total.

    python flops.py                     the published accounting, then the joint model's own at 224 pixels
    python flops.py --size 112 --clip-len 16

The published 54.75G FLOPs are the multiply-accumulates of the convolutions, plus 2 per element for every
BatchNorm, of one test view of 8x256x256. The published 32.45M parameters have a single linear layer
2048 -> 400 as the head: they are those of the plain SlowOnly, not of the joint model. Counting is done by
torch's own FLOP counter, which counts a multiply-accumulate as 2.
"""

import signal
from collections import Counter

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


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add, whole = parser.add_argument, number(int, 1)
    add('--size', type=whole, default=224, help='side of the crop (default: %(default)s)')
    add('--clip-len', type=whole, default=8, help='frames of a clip (default: %(default)s)')
    add('--width', type=whole, default=64, help='channels of the stem (default: %(default)s)')
    blocks = 'blocks per stage (default: 3 4 6 3, a ResNet-50)'
    add('--layers', type=whole, nargs=4, default=(3, 4, 6, 3), metavar='N', help=blocks)
    args = parser.parse_args(argv)
    with torch.device('meta'):
        network = OmniSlowOnly(layers=args.layers, width=args.width)
        sizes = (8, 256, 256), (args.clip_len, args.size, args.size), (args.size, args.size)
        test_view, clip, image = (torch.empty(1, 3, *size, dtype=torch.uint8) for size in sizes)
        plain = parameters(nn.Linear(32 * args.width, 400))

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
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `flops.py | head`
    main()
