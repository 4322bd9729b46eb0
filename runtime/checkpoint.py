"""Weights on disk: written whole or not at all, read as data, the newest good one found, and taken from or
given to MMAction2 and 2D ResNets. Begin with `write` and `load`.
"""

import os
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from model import OmniSlowOnly

# The names that a run gives; whatever else lies in its folder is the user's.
OURS = re.compile(r'(epoch_(\d+)|best|latest)\.pth')


# Writing --------------------------------------------------------------------------------------------------


def write(state: dict, folder: Path, *names: str) -> None:
    """Write `state` under several names, in this order. Each is whole or not there, whenever the process
    dies: written beside, synced, renamed. Raises OSError where that fails; older files are intact then."""
    name = names[0]
    try:
        for left in folder.glob('*.pth.tmp'):  # of a process that was killed
            if OURS.fullmatch(left.stem):
                left.unlink()
        for name in names:
            beside = folder / f'{name}.tmp'
            with open(beside, 'wb') as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, folder / name)
        with suppress(OSError):  # some network mounts do not sync a folder, Windows does not open it
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        if 'DataLoader' in str(error):  # whose signal that a worker has died comes anywhere
            raise
        reason = getattr(error, 'strerror', None) or 'writing failed'
        with suppress(OSError):
            (folder / f'{name}.tmp').unlink(missing_ok=True)
            reason += f', {shutil.disk_usage(folder).free >> 20} MB are free there'
        line = f'{folder / name} cannot be written ({reason}); the older checkpoints are intact'
        raise OSError(line) from None


def ours(folder: Path) -> list[Path]:
    """The checkpoints of a folder, by their names."""
    return [path for path in folder.glob('*.pth') if OURS.fullmatch(path.name)]


def epochs(folder: Path) -> dict[int, Path]:
    """The epoch_N.pth of a folder by their number, the newest first."""
    numbers = {path: OURS.fullmatch(path.name)[2] for path in ours(folder)}
    return dict(sorted(((int(n), path) for path, n in numbers.items() if n), reverse=True))


# Reading --------------------------------------------------------------------------------------------------


class Inert:
    """Stands in for whatever a file names beside tensors and plain values."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def load(path: str | os.PathLike) -> dict:
    """Read a checkpoint file as data: no code that its pickle names is imported or run.

    Returns our checkpoints as they were saved (see runtime/run.py); for an official one {'model': our
    state_dict}. Raises OSError, or ValueError where the file is no checkpoint.
    """
    damaged = None
    open(path, 'rb').close()  # an OSError below is a damaged file's
    try:
        try:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except (OSError, ValueError):  # not there, or in torch's old format
            foreign = []
        with torch.serialization.safe_globals([(Inert, name) for name in foreign]):
            saved = torch.load(path, map_location='cpu', weights_only=True)
        if zipfile.is_zipfile(path):  # torch does not look at the checksums that it has written
            with zipfile.ZipFile(path) as archive:
                written = any(info.CRC for info in archive.infolist())  # torch can be told to leave them out
                damaged = archive.testzip() if written else None
    except Exception:  # a damaged file can raise anything
        raise ValueError(f'{path}: not a checkpoint of train.py or MMAction2, or a damaged one') from None
    if damaged:
        raise ValueError(f'{path}: a damaged checkpoint (wrong checksum: {damaged})')
    if isinstance(saved, dict) and isinstance(saved.get('model'), dict):
        return saved
    state = saved.get('state_dict', saved) if isinstance(saved, dict) else None
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f'{path}: no weights found in it; expected a checkpoint of train.py or of MMAction2')
    state = {key.removeprefix('module.'): value for key, value in state.items() if isinstance(value, Tensor)}
    return {'model': from_mmaction2(state) if any(key.startswith('cls_head.') for key in state) else state}


def load_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Our state_dict from one of our checkpoints or an official one (tensors only, no code is run)."""
    return load(path)['model']


def load_run(path: str | os.PathLike) -> dict:
    """A checkpoint to go on from."""
    saved = load(path)
    if 'optimizer' not in saved:
        raise ValueError(f'{path}: holds weights only, no training run to go on with')
    return saved


def newest(folder: Path, show: Callable[[str], None]) -> tuple[dict | None, str]:
    """The newest good checkpoint of a run's folder and its path; (None, '') where it holds none.

    Those that are damaged are shown and skipped. Raises ValueError where every one is.
    """
    damaged = 0
    for path in [folder / 'latest.pth', *epochs(folder).values(), folder / 'best.pth']:
        try:
            return load_run(path), str(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            damaged += 1
            show(f'skipping {error}')
    if damaged:
        raise ValueError(f'{folder}: no checkpoint in it is whole; move them away to start afresh')
    return None, ''


# Into a network -------------------------------------------------------------------------------------------


def build(saved: dict, path: str) -> OmniSlowOnly:
    """The network of a checkpoint, its size read off the weights, in eval mode."""
    try:
        network = OmniSlowOnly.from_state_dict(saved['model'])
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    load_into(network, saved['model'], path)
    return network.eval()


def load_into(network: nn.Module, state: dict[str, Tensor], path: str) -> None:
    """`load_state_dict`, with one line for weights of another network: ValueError names the first."""
    own = network.state_dict()
    for key in [*own, *state]:
        if key not in state:
            raise ValueError(f'{path}: no weight {key}; it is a checkpoint of another network')
        if key not in own:
            raise ValueError(f'{path}: weight {key} has no place in this network')
        if own[key].shape != state[key].shape:
            theirs, ours = tuple(state[key].shape), tuple(own[key].shape)
            raise ValueError(f'{path}: weight {key} is {theirs}, this network has {ours}')
    network.load_state_dict(state)


def load_all_but_other_heads(
    network: nn.Module, state: dict[str, Tensor], path: str, other: Sequence[str] = ()
) -> list[str]:
    """Load weights of a network that may have other classes: a head that differs keeps its own weights.

    Heads differ where their shapes do; `other` names more of them by their source. Returns the sources whose
    head kept its own. Raises ValueError, as `load_into` does, where the backbones differ.
    """
    own, kept = network.state_dict(), []
    for source in dict.fromkeys(key.split('_head.')[0] for key in [*own, *state] if '_head.' in key):
        ours, theirs = (
            {key: value for key, value in weights.items() if key.startswith(f'{source}_head.')}
            for weights in (own, state)
        )
        same = {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
        if not same or source in other:
            state = {key: value for key, value in state.items() if key not in theirs} | ours
            kept += [source] if ours else []
    load_into(network, state, path)
    return kept


def load_2d(network: nn.Module, path: str) -> None:
    """Start from a 2D ResNet's weights, or from those of an image-only run; heads stay as they are."""
    try:
        network.load_state_dict(inflate_2d(load_weights(path), network), strict=False)
    except ValueError as error:
        raise ValueError(f'{path}: {error}' if path not in str(error) else str(error)) from None


def inflate_2d(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Backbone weights for `network` from a 2D ResNet with torchvision's key names (`backbone.` before them
    or not).

    A 1x1 kernel where the network has a temporal one is divided evenly over the three frames, as in I3D
    (https://arxiv.org/abs/1705.07750). Of one of our checkpoints the temporal kernels are taken as they are;
    of one that was trained on images only, the image statistics for both sources. Classifiers are left out.
    Raises ValueError naming the first weight that is missing or of another shape.
    """
    ours = any('image_running_' in key for key in state)
    images_only = ours and not any(key.startswith('video_head.') for key in state)
    inflated = {}
    for key, own in network.state_dict().items():
        if '_head.' in key or key.endswith('num_batches_tracked'):  # which no momentum here asks for
            continue
        source = key if ours else key.replace('image_running_', 'running_')
        if images_only:
            source = source.replace('.running_', '.image_running_')
        value = state.get(source, state.get(f'backbone.{source}'))
        if value is None:
            raise ValueError(f'no weight {source}')
        if is_temporal(own) and tuple(value.shape[2:]) == (1, 1):
            value = (value / own.shape[2]).expand(-1, -1, own.shape[2], -1)
        if value.shape != own.shape:
            raise ValueError(f'{source} is {tuple(value.shape)}, the network here has {tuple(own.shape)}')
        inflated[key] = value
    return inflated


def images_share_statistics(state: dict[str, Tensor]) -> bool:
    """Whether a checkpoint from elsewhere left images the running statistics of videos."""
    own = [key for key in state if '.image_running_' in key]
    return bool(own) and all(torch.equal(state[key], state[key.replace('image_', '')]) for key in own)


# From and to MMAction2 ------------------------------------------------------------------------------------

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
