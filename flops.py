"""What the network costs: parameters and FLOPs.

    python flops.py                     the published accounting, then the joint model's own at 224 pixels
    python flops.py --size 112 --clip-len 16

The published 54.75G FLOPs are the multiply-accumulates of the convolutions, plus 2 per element for every
BatchNorm, of one test view of 8x256x256. The published 32.45M parameters have a single linear layer
2048 -> 400 as the head: they are those of the plain SlowOnly, not of the joint model. Counting is done by
torch's own FLOP counter, which counts a multiply-accumulate as 2.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from model import OmniSlowOnly
from runtime.command import Parser, number


def count(function: Callable, x: Tensor) -> tuple[int, int]:
    """The multiply-accumulates, and the BatchNorm operations at 2 per element, of `function(x)`."""
    norms = []

    def count_norm(module: nn.Module, args: tuple, output: Tensor) -> None:
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            norms.append(2 * output.numel())

    with register_module_forward_hook(count_norm), FlopCounterMode(display=False) as counter, torch.no_grad():
        function(x)
    return counter.get_total_flops() // 2, sum(norms)


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
        network = OmniSlowOnly(layers=args.layers, width=args.width).eval()
        sizes = (8, 256, 256), (args.clip_len, args.size, args.size), (args.size, args.size)
        test_view, clip, image = (torch.empty(1, 3, *size, dtype=torch.uint8) for size in sizes)
        plain = parameters(nn.Linear(32 * args.width, 400))

    convs, norms = count(network.features, test_view)
    backbone = parameters(network) - parameters(network.image_head) - parameters(network.video_head)
    print('Published accounting (multiply-accumulates, BatchNorm 2 per element, 8x256x256, one linear head)')
    print(f'  FLOPs       {(convs + norms) / 1e9:.2f}G   = convolutions {convs:,} + BatchNorm {norms:,}')
    print(f'  parameters  {(backbone + plain) / 1e6:.2f}M   = backbone {backbone:,} + head {plain:,}\n')
    print(f'The joint model: {parameters(network) / 1e6:.2f}M parameters = backbone {backbone:,}', end='')
    print(
        f' + image head {parameters(network.image_head):,} + video head {parameters(network.video_head):,}\n'
    )
    for kind, x in (('clip', clip), ('image', image)):
        title = f'{kind} {"x".join(map(str, x.shape[2:]))}'
        print(f'{title:18} {"multiply-accumulates":>22} {"BatchNorm":>14}')
        for part, function in (('backbone', network.features), ('with its head', network)):
            macs, norms = count(function, x)
            print(f'  {part:16} {macs:22,} {norms:14,}')
        print()


if __name__ == '__main__':
    main()
