"""SlowOnly-R50 that recognizes images and videos with one set of weights.

    model = OmniSlowOnly()
    video_logits = model(clips)                         # (B, 3, T, H, W) -> (B, 400)
    image_logits = model(images)                        # (B, 3, H, W)    -> (B, 1000)
    video_logits, image_logits = model(clips, images)   # one call for a joint training step

An image is a video of one frame. Time is folded into the batch, so every layer is a 2D layer and there is one
forward path: a spatial convolution sees (B*T, C, H, W), a temporal one sees the same memory as (B, C, T,
H*W).

Networks: SlowOnly is the slow pathway of SlowFast (Feichtenhofer et al., https://arxiv.org/abs/1812.03982),
joint training is OmniSource (Duan et al., https://arxiv.org/abs/2003.13042); layer by layer this is
MMAction2's `slowonly_r50_8xb16-8x8x1-256e_imagenet-kinetics400-rgb`.
"""

import copy
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

PIXEL_MEAN = (123.675, 116.28, 103.53)  # of ImageNet, RGB 0..255
PIXEL_STD = (58.395, 57.12, 57.375)


# ----------------------------------------------------------------------------------------------------------
# The network
# ----------------------------------------------------------------------------------------------------------


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d with shared weights and, for each source, running statistics of its own.

    While training, each batch is normalized by its own statistics, as always. `running_mean` and
    `running_var` follow the videos only; images have `image_running_mean` and `image_running_var`, so that
    they can be evaluated too.
    """

    def __init__(self, channels: int):
        super().__init__(channels, momentum=0.01)
        self.register_buffer('image_running_mean', torch.zeros(channels))
        self.register_buffer('image_running_var', torch.ones(channels))

    def forward(self, x: Tensor, is_image: bool) -> Tensor:
        if is_image:
            mean, var = self.image_running_mean, self.image_running_var
        else:
            mean, var = self.running_mean, self.running_var
            if self.training:
                self.num_batches_tracked.add_(1)
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps)


class TemporalConv(nn.Conv2d):
    """Convolution over three frames at each place: the (3, 1, 1) kernel of a Conv3d, as a 2D convolution.

    The weight is (out, in, 3, 1). x: (B*T, C, H, W) -> (B*T, out, H, W). In channels-last memory the clip
    viewed as (B, C, T, H*W) is channels-last again, so nothing is copied.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, (3, 1), padding=(1, 0), bias=False)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        if frames == 1:
            # A still picture, repeated, would meet all three taps with the same pixels.
            return F.conv2d(x, self.weight.sum(2, keepdim=True), self.bias)
        height, width = x.shape[2:]
        x = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(3)  # (B*T, C, H, W) -> (B, C, T, H*W)
        x = super().forward(x)
        return x.unflatten(3, (height, width)).transpose(1, 2).flatten(0, 1)


class Bottleneck(nn.Module):
    """1x1 (over three frames where `temporal`), 3x3 with the stride, 1x1 to 4 * width, added to the
    shortcut."""

    def __init__(self, in_channels: int, width: int, stride: int, temporal: bool):
        super().__init__()
        out_channels = 4 * width
        self.temporal = temporal
        self.conv1 = (
            TemporalConv(in_channels, width) if temporal else nn.Conv2d(in_channels, width, 1, bias=False)
        )
        self.bn1 = BatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = BatchNorm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = BatchNorm(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.ModuleList([shortcut, BatchNorm(out_channels)])

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
        video_classes, image_classes: sizes of the two heads; 0 leaves that head out. layers: bottleneck
        blocks in each of the four stages; (3, 4, 6, 3) is ResNet-50, (3, 4, 23, 3) ResNet-101. width:
        channels of the stem; the features have 32 times as many.

    Input is uint8, or float of the same range 0..255; it is normalized here, so that nobody can forget to.
    Setting `model.normalize = False` takes float input that is normalized already. Weights are initialized by
    PyTorch's defaults and kept in channels-last memory.
    """

    def __init__(
        self,
        video_classes: int = 400,
        image_classes: int = 1000,
        layers: tuple[int, ...] = (3, 4, 6, 3),
        width: int = 64,
    ):
        super().__init__()
        self.normalize = True
        self.register_buffer('mean', torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm(width)
        self.layer1 = self._stage(width, width, layers[0], stride=1, temporal=False)
        self.layer2 = self._stage(4 * width, 2 * width, layers[1], stride=2, temporal=False)
        self.layer3 = self._stage(8 * width, 4 * width, layers[2], stride=2, temporal=True)
        self.layer4 = self._stage(16 * width, 8 * width, layers[3], stride=2, temporal=True)

        features = 32 * width
        self.image_head = self.video_head = None
        if image_classes:
            self.image_head = nn.Sequential(
                nn.BatchNorm1d(features), nn.Dropout(0.2), nn.Linear(features, image_classes)
            )
        if video_classes:
            self.video_head = nn.Sequential(
                nn.Linear(features, 2 * video_classes),
                nn.BatchNorm1d(2 * video_classes),
                nn.ReLU(inplace=True),
                nn.Dropout(0.5),
                nn.Linear(2 * video_classes, video_classes),
            )
        self.to(memory_format=torch.channels_last)

    @staticmethod
    def _stage(in_channels: int, width: int, blocks: int, stride: int, temporal: bool) -> nn.ModuleList:
        first = Bottleneck(in_channels, width, stride, temporal)
        return nn.ModuleList([first] + [Bottleneck(4 * width, width, 1, temporal) for _ in range(blocks - 1)])

    def features(self, x: Tensor) -> Tensor:
        """Clips (B, 3, T, H, W) or images (B, 3, H, W) -> their mean feature over time and space, (B, 32 *
        width)."""
        is_image = x.ndim == 4
        frames = 1 if is_image else x.shape[2]
        if not is_image:
            x = x.transpose(1, 2).flatten(0, 1)  # (B, 3, T, H, W) -> (B*T, 3, H, W)
        x = x.contiguous(memory_format=torch.channels_last)
        if self.normalize:
            x = (x - self.mean) / self.std

        x = F.relu(self.bn1(self.conv1(x), is_image))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x, frames, is_image)
        return x.mean((2, 3)).unflatten(0, (-1, frames)).mean(1)  # (B*T, C, H, W) -> (B*T, C) -> (B, C)

    def forward(self, x: Tensor, images: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of clips or images; with both, (video_logits, image_logits)."""
        if images is not None:
            return self.video_head(self.features(x)), self.image_head(self.features(images))
        return (self.image_head if x.ndim == 4 else self.video_head)(self.features(x))


class Folded(nn.Module):
    """What is left of a BatchNorm once its affine map is part of the convolution before it: nothing."""

    def forward(self, x: Tensor, is_image: bool) -> Tensor:
        return x


def fold_batchnorm(network: OmniSlowOnly, is_image: bool) -> OmniSlowOnly:
    """A copy for inference on one source, with its BatchNorms folded into the convolutions: the same function
    up to rounding, with half the passes over memory."""
    network = copy.deepcopy(network).eval()

    def fold(conv: nn.Conv2d, bn: BatchNorm) -> Folded:
        prefix = 'image_running' if is_image else 'running'
        mean, var = getattr(bn, f'{prefix}_mean'), getattr(bn, f'{prefix}_var')
        weight, bias = fuse_conv_bn_weights(conv.weight, None, mean, var, bn.eps, bn.weight, bn.bias)
        conv.weight, conv.bias = weight, bias
        return Folded()

    network.bn1 = fold(network.conv1, network.bn1)
    for block in network.modules():
        if isinstance(block, Bottleneck):
            block.bn1, block.bn2 = fold(block.conv1, block.bn1), fold(block.conv2, block.bn2)
            block.bn3 = fold(block.conv3, block.bn3)
            if block.downsample is not None:
                block.downsample[1] = fold(*block.downsample)
    return network.to(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------------------
# Weights: our checkpoints, MMAction2's, and 2D ResNets
# ----------------------------------------------------------------------------------------------------------

# The backbone has the key names of torchvision's ResNet; MMAction2 puts `backbone.` before them. The heads:
HEAD_NAMES = {
    'cls_head.fc2d.2.': 'image_head.0.',
    'cls_head.fc2d.4.': 'image_head.2.',
    'cls_head.fc3d.2.': 'video_head.0.',
    'cls_head.fc3d.3.': 'video_head.1.',
    'cls_head.fc3d.6.': 'video_head.4.',
}


def from_mmaction2(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official checkpoint's state_dict -> ours. It has no image statistics: the videos' take their
    place."""
    ours = {}
    for key, value in state_dict.items():
        for theirs, mine in {'backbone.': '', **HEAD_NAMES}.items():
            if key.startswith(theirs):
                key = mine + key.removeprefix(theirs)
        if value.ndim == 5:  # (O, I, 1, kH, kW) -> (O, I, kH, kW) and (O, I, 3, 1, 1) -> (O, I, 3, 1)
            value = value.squeeze(2 if value.shape[2] == 1 else 4)
        ours[key] = value
        if not key.startswith(tuple(HEAD_NAMES.values())) and 'running_' in key:
            ours[key.replace('running_', 'image_running_')] = value.clone()
    return ours


def to_mmaction2(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_mmaction2`; the image statistics have no place there and are left out."""
    theirs = {}
    for key, value in state_dict.items():
        if 'image_running_' not in key:
            if value.ndim == 4:
                value = value.unsqueeze(4 if is_temporal(value) else 2)
            theirs[to_mmaction2_key(key)] = value
    return theirs


def to_mmaction2_key(key: str) -> str:
    """The name that one of our weights has there."""
    for theirs, mine in HEAD_NAMES.items():
        if key.startswith(mine):
            return theirs + key.removeprefix(mine)
    return f'backbone.{key}'


def is_temporal(weight: Tensor) -> bool:
    """Whether a weight of our state_dict belongs to a TemporalConv."""
    return weight.ndim == 4 and tuple(weight.shape[2:]) == (3, 1)


def inflate_2d(state_dict: dict[str, Tensor], model: OmniSlowOnly) -> dict[str, Tensor]:
    """Backbone weights for `model` from a 2D ResNet with torchvision's key names (`backbone.` before them or
    not).

    A 1x1 kernel where the model has a temporal one is divided evenly over the three frames, as in I3D
    (https://arxiv.org/abs/1705.07750). Of one of our checkpoints the temporal kernels are taken as they are;
    of one that was trained on images only, the image statistics for both sources. Classifiers are left out.
    Raises ValueError naming the first weight that is missing or of another shape.
    """
    ours = any('image_running_' in key for key in state_dict)
    images_only = ours and not any(key.startswith('video_head.') for key in state_dict)
    inflated = {}
    for key, own in model.state_dict().items():
        if key.startswith(('image_head.', 'video_head.')):
            continue
        source = key if ours else key.replace('image_running_', 'running_')
        if images_only:
            source = source.replace('.running_', '.image_running_')
        value = state_dict.get(source, state_dict.get(f'backbone.{source}'))
        if value is None and key.endswith('num_batches_tracked'):
            value = torch.zeros_like(own)  # files from before PyTorch 0.4.1 lack it
        if value is None:
            raise ValueError(f'no weight {source}')
        if is_temporal(own) and tuple(value.shape[2:]) == (1, 1):
            value = (value / own.shape[2]).expand(-1, -1, own.shape[2], -1)
        if value.shape != own.shape:
            raise ValueError(f'{source} is {tuple(value.shape)}, the network here has {tuple(own.shape)}')
        inflated[key] = value
    return inflated


def load_into(model: nn.Module, state_dict: dict[str, Tensor], path: str) -> None:
    """`model.load_state_dict`, with one line for a checkpoint of another network: ValueError names the
    weight."""
    own = model.state_dict()
    for key in [*own, *state_dict]:
        if key not in state_dict:
            raise ValueError(f'{path}: no weight {key}; it is a checkpoint of another network')
        if key not in own:
            raise ValueError(f'{path}: weight {key} has no place in this network')
        if own[key].shape != state_dict[key].shape:
            theirs, ours = tuple(state_dict[key].shape), tuple(own[key].shape)
            raise ValueError(f'{path}: weight {key} is {theirs}, this network has {ours}')
    model.load_state_dict(state_dict)


def load_all_but_other_heads(
    model: nn.Module, state_dict: dict[str, Tensor], path: str, other: Sequence[str] = ()
) -> list[str]:
    """Load weights of a network that may have other classes: a head that differs keeps its own weights.

    Heads differ where their shapes do; `other` names more of them, 'video' or 'image'. Returns the names of
    the heads that kept theirs. Raises ValueError, as `load_into` does, where the backbones differ.
    """

    def shapes(state: dict[str, Tensor], head: str) -> dict:
        return {key: value.shape for key, value in state.items() if key.startswith(head)}

    own, kept = model.state_dict(), []
    state = dict(state_dict)
    for head in ('video_head.', 'image_head.'):
        if shapes(state, head) != shapes(own, head) or head.removesuffix('_head.') in other:
            state = {key: value for key, value in state.items() if not key.startswith(head)}
            state |= {key: value for key, value in own.items() if key.startswith(head)}
            kept += [head.removesuffix('_head.')] if shapes(own, head) else []
    load_into(model, state, path)
    return kept


def load_checkpoint(path: str) -> dict:
    """Read a checkpoint file as data: whatever code its pickle names is never imported or run.

    Returns our checkpoints as they were saved (see train.py); for an official one {'model': our state_dict}.
    Raises OSError, or ValueError where the file is no checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except OSError:
        raise
    except Exception:
        checkpoint = _load_tensors_only(path)
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get('model'), dict):
        return checkpoint
    state_dict = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict) or not any(
        isinstance(value, Tensor) for value in state_dict.values()
    ):
        raise ValueError(f'{path}: no weights found in it; expected a checkpoint of train.py or of MMAction2')
    state_dict = {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}
    if any(key.startswith('cls_head.') for key in state_dict):
        state_dict = from_mmaction2(state_dict)
    return {'model': state_dict}


def load_weights(path: str) -> dict[str, Tensor]:
    """Our state_dict from one of our checkpoints or an official one (tensors only, no code is run)."""
    return load_checkpoint(path)['model']


class _Inert:
    """Stands in for every class or function that a pickle names and that weights do not need."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __call__(self, *args, **kwargs):
        return _Inert()

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        pass

    def extend(self, items):
        pass


class _TensorUnpickler(pickle.Unpickler):
    """Official files hold `mmengine` objects, which `weights_only=True` refuses. Here they come out as
    `_Inert`."""

    allowed = {
        ('torch._utils', '_rebuild_tensor_v2'): torch._utils._rebuild_tensor_v2,
        ('torch._utils', '_rebuild_parameter'): torch._utils._rebuild_parameter,
        ('collections', 'OrderedDict'): OrderedDict,
    }

    def find_class(self, module, name):
        return self.allowed.get((module, name), _Inert)


class _TensorPickle:
    """What torch.load asks of a `pickle_module`."""

    Unpickler = _TensorUnpickler

    @staticmethod
    def load(file, **kwargs):
        return _TensorUnpickler(file, **kwargs).load()


def _load_tensors_only(path: str) -> object:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith('/constants.pkl') for name in archive.namelist()):
                    raise ValueError('a TorchScript program')  # torch.load would hand it to torch.jit.load
        return torch.load(path, map_location='cpu', weights_only=False, pickle_module=_TensorPickle)
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f'{path}: not a checkpoint, or a damaged one ({reason[0]})') from None
