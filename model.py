"""SlowOnly-R50 that recognizes images and videos with one set of weights.

    model = OmniSlowOnly()
    logits = model({'video': clips, 'image': images})   # {source: logits}; one call for a joint training step
    video_logits = model(clips)                         # (B, 3, T, H, W) -> (B, 400)
    image_logits = model(images)                        # (B, 3, H, W)    -> (B, 1000)

An image is a video of one frame. Time is folded into the batch, so every layer is a 2D layer and there is one
forward path: a spatial convolution sees (B*T, C, H, W), a temporal one sees the same memory as (B, C, T,
H*W).

SlowOnly is the slow pathway of SlowFast (Feichtenhofer et al., https://arxiv.org/abs/1812.03982). MMAction2
lists the joint training under OmniSource (Duan et al., https://arxiv.org/abs/2003.13042); layer by layer this
is its `slowonly_r50_8xb16-8x8x1-256e_imagenet-kinetics400-rgb`. Begin with `OmniSlowOnly.forward`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIXEL_MEAN = (123.675, 116.28, 103.53)  # of ImageNet, RGB 0..255
PIXEL_STD = (58.395, 57.12, 57.375)
MOMENTUM = 0.01  # of the running statistics: a tenth of PyTorch's, because steps are many and batches small


class DualStatsBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d with shared weights, but separate running statistics for clips and for images.

    In training, each batch is normalized by its own statistics, as usual. `running_mean` and `running_var`
    follow the videos only. Batches of images have `image_running_mean` and `image_running_var`, so that they
    can be evaluated too.
    """

    def __init__(self, channels: int):
        super().__init__(channels, momentum=MOMENTUM)
        self.register_buffer('image_running_mean', torch.zeros(channels))
        self.register_buffer('image_running_var', torch.ones(channels))

    def forward(self, x: Tensor, is_image: bool) -> Tensor:
        if is_image:
            mean, var = self.image_running_mean, self.image_running_var
        else:
            mean, var = self.running_mean, self.running_var
        # In training this updates `mean` and `var` in place, and normalizes by the batch alone.
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps)


def running_statistics(network: nn.Module) -> list[Tensor]:
    """The running means and variances, float (C,) each, of all layers in training mode, of both sources and
    the heads. Frozen layers are in eval mode; their statistics do not change."""
    learning = [module for module in network.modules() if module.training]
    named = [item for module in learning for item in module.named_buffers(recurse=False)]
    return [buffer for name, buffer in named if 'running_' in name]  # not num_batches_tracked


def set_momentum(network: nn.Module, step: int) -> None:
    """Set the momentum of the running statistics for a step of a run, counted from 0.

    It begins as 1 / (step + 1), which averages the first steps evenly, and ends as the layer's own: after a
    hundred steps in the backbone (0.01), after ten in the heads (PyTorch's 0.1). With 0.01 from the start, a
    third of the old values (0 and 1, or another data set's statistics) would be left after a hundred steps.
    """
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            if not hasattr(module, 'final_momentum'):
                module.final_momentum = module.momentum
            module.momentum = max(1 / (step + 1), module.final_momentum)


class TemporalConv(nn.Conv2d):
    """Convolution over three frames at each place: the (3, 1, 1) kernel of a Conv3d, as a 2D convolution.

    The weight is (out, in, 3, 1). x: (B*T, C, H, W) -> (B*T, out, H, W). In channels-last memory the clip
    viewed as (B, C, T, H*W) is channels-last again, so nothing is copied. A single frame is treated as a
    still picture repeated over time, not as a clip padded with zeros.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, (3, 1), padding=(1, 0), bias=False)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        if frames == 1:
            # In a repeated still picture, all three taps would see the same pixels: so one tap, their sum.
            return F.conv2d(x, self.weight.sum(2, keepdim=True), self.bias)  # `fold_batchnorm` adds a bias
        height, width = x.shape[2:]
        x = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(3)  # (B*T, C, H, W) -> (B, C, T, H*W)
        x = super().forward(x)
        return x.unflatten(3, (height, width)).transpose(1, 2).flatten(0, 1)


class Bottleneck(nn.Module):
    """1x1 (over three frames if `temporal`), 3x3 with the stride, 1x1 to 4 * width; plus the shortcut."""

    def __init__(self, in_channels: int, width: int, stride: int, temporal: bool):
        super().__init__()
        out_channels = 4 * width
        self.temporal = temporal
        if temporal:
            self.conv1 = TemporalConv(in_channels, width)
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = DualStatsBatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = DualStatsBatchNorm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = DualStatsBatchNorm(out_channels)
        self.downsample = None
        # The shortcut is the input itself, unless its size changes.
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.ModuleList([shortcut, DualStatsBatchNorm(out_channels)])

    def forward(self, x: Tensor, frames: int, is_image: bool) -> Tensor:
        shortcut = x
        x = self.conv1(x, frames) if self.temporal else self.conv1(x)
        x = F.relu(self.bn1(x, is_image))
        x = F.relu(self.bn2(self.conv2(x), is_image))
        x = self.bn3(self.conv3(x), is_image)
        if self.downsample is not None:
            conv, bn = self.downsample
            shortcut = bn(conv(shortcut), is_image)
        return F.relu(x + shortcut)


class OmniSlowOnly(nn.Module):
    """The joint recognizer: a SlowOnly ResNet, a head for videos and a head for images.

    Args:
        video_classes, image_classes: sizes of the two heads; 0 leaves that head out.
        layers: bottleneck blocks of the four stages; (3, 4, 6, 3) is ResNet-50, (3, 4, 23, 3) ResNet-101.
        width: channels of the stem; the features have 32 times as many.
        hidden: units of the video head's hidden layer, 0 for a single linear layer. The default is the
            published 2 * video_classes, but 0 below 200 classes: few units would be a bottleneck.

    Input is uint8, or float in the same range 0..255. It is normalized here, so that nobody can forget to;
    with `model.normalize = False` it must be normalized already. Weights are initialized by PyTorch's
    defaults and kept in channels-last memory.

    A network that replaces this one needs the same arguments, `size_of`, `head`, `features`,
    `forward` and, for --freeze, `freeze_trunk` and `train`. `fold_batchnorm` leaves other BatchNorms alone.
    """

    def __init__(
        self,
        video_classes: int = 400,
        image_classes: int = 1000,
        layers: tuple[int, ...] = (3, 4, 6, 3),
        width: int = 64,
        hidden: int | None = None,
    ):
        super().__init__()
        self.normalize = True
        self.checked_range = False  # of float input, see `to_normalized`
        # Not persistent: constants, which official checkpoints do not hold either.
        self.register_buffer('mean', torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = DualStatsBatchNorm(width)
        # No stage shortens time, and only the last two look at it: at features, not at pixels.
        self.layer1 = self._stage(width, width, layers[0], stride=1, temporal=False)
        self.layer2 = self._stage(4 * width, 2 * width, layers[1], stride=2, temporal=False)
        self.layer3 = self._stage(8 * width, 4 * width, layers[2], stride=2, temporal=True)
        self.layer4 = self._stage(16 * width, 8 * width, layers[3], stride=2, temporal=True)

        features = 32 * width
        # Each source has its own classes, so its own head, whose BatchNorm needs one set of statistics only.
        self.image_head = self.video_head = None
        if image_classes:
            self.image_head = nn.Sequential(
                nn.BatchNorm1d(features), nn.Dropout(0.2), nn.Linear(features, image_classes)
            )
        if hidden is None:
            hidden = 2 * video_classes if video_classes >= 200 else 0
        if video_classes and hidden:
            self.video_head = nn.Sequential(
                nn.Linear(features, hidden),
                nn.BatchNorm1d(hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(0.5),
                nn.Linear(hidden, video_classes),
            )
        elif video_classes:
            self.video_head = nn.Sequential(nn.Linear(features, video_classes))
        self.to(memory_format=torch.channels_last)  # what makes `TemporalConv` views free of copies

    @staticmethod
    def _stage(in_channels: int, width: int, blocks: int, stride: int, temporal: bool) -> nn.ModuleList:
        first = Bottleneck(in_channels, width, stride, temporal)
        return nn.ModuleList([first] + [Bottleneck(4 * width, width, 1, temporal) for _ in range(blocks - 1)])

    @staticmethod
    def size_of(state: dict[str, Tensor]) -> dict:
        """The arguments of a network with these weights. Raises ValueError for other kinds of weights."""
        stages = [{key.split('.')[1] for key in state if key.startswith(f'layer{i}.')} for i in range(1, 5)]
        if not all(stages) or not {'conv1.weight', 'layer1.0.conv3.weight'} <= state.keys():
            raise ValueError('not weights of a SlowOnly or another ResNet with bottlenecks')
        video_head = [x for key, x in state.items() if key.startswith('video_head.') and x.ndim == 2]
        return {
            'video_classes': len(video_head[-1]) if video_head else 0,
            'hidden': len(video_head[0]) if len(video_head) == 2 else 0,
            'image_classes': len(state.get('image_head.2.weight', ())),
            'layers': [len(blocks) for blocks in stages],
            'width': len(state['conv1.weight']),
        }

    def freeze_trunk(self) -> None:
        """Let only the heads learn."""
        for name, part in self.named_children():
            part.requires_grad_(name.endswith('_head'))
        self.train(self.training)

    def train(self, mode: bool = True) -> 'OmniSlowOnly':
        """As usual, but frozen parts stay in eval mode and so keep their running statistics."""
        super().train(mode)
        for part in self.children():
            learns = [parameter.requires_grad for parameter in part.parameters()]
            if learns and not any(learns):
                part.eval()
        return self

    def head(self, source: str) -> nn.Module | None:
        """The head of 'video', 'image' or another source; its last layer has an output for each class."""
        return getattr(self, f'{source}_head', None)

    def features(self, x: Tensor) -> Tensor:
        """Clips (B, 3, T, H, W) or images (B, 3, H, W) -> features (B, 32 * width), means over time and
        space."""
        is_image = x.ndim == 4
        frames = 1 if is_image else x.shape[2]
        if not is_image:
            x = x.transpose(1, 2).flatten(0, 1)  # (B, 3, T, H, W) -> (B*T, 3, H, W)
        x = x.contiguous(memory_format=torch.channels_last)
        if self.normalize:
            x = self.to_normalized(x)

        x = F.relu(self.bn1(self.conv1(x), is_image))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x, frames, is_image)
        return x.mean((2, 3)).unflatten(0, (-1, frames)).mean(1)  # (B*T, C, H, W) -> (B*T, C) -> (B, C)

    def to_normalized(self, x: Tensor) -> Tensor:
        """uint8 or float pixels 0..255 -> mean 0, deviation 1. Raises ValueError if the first batch of floats
        is not above 1: pixels scaled to 0..1 would all look black."""
        if x.is_floating_point() and not (self.checked_range or torch.compiler.is_compiling()):
            if x.max() <= 1:
                raise ValueError('pixels are at most 1; the network takes uint8, or floats from 0 to 255')
            self.checked_range = True  # once: reading a value makes the CPU wait for the GPU
        return (x - self.mean) / self.std

    def forward(self, x: dict[str, Tensor] | Tensor, images: Tensor | None = None):
        """{source: pixels} -> {source: logits}, the form that training uses: DDP wants one call a step.

        For convenience also: clips (B, 3, T, H, W) or images (B, 3, H, W) -> logits; both -> a pair of
        logits.
        """
        if isinstance(x, dict):
            return {source: self.head(source)(self.features(pixels)) for source, pixels in x.items()}
        if images is not None:
            return self(x), self(images)
        return self.head('image' if x.ndim == 4 else 'video')(self.features(x))
