"""Weights on disk: written whole or not at all, read as data only, the newest good ones found; also taken
from elsewhere: an address, MMAction2, a 2D ResNet. Begin with `write` and `load`.
"""

import argparse
import hashlib
import io
import os
import re
import socket
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from data import one_line
from model import OmniSlowOnly
from runtime.distributed import say, writing
from runtime.mmaction2 import from_mmaction2
from runtime.mmaction2 import to_mmaction2 as to_mmaction2  # a part of this file's interface

# The published sizes, for checkpoints that do not say theirs
SIZES = {'layers': [3, 4, 6, 3], 'width': 64, 'size': 224, 'clip_len': 8, 'frame_interval': 8}
# What a run needs, besides its weights, to go on
RUN = {'step': int, 'epoch': int, 'steps_per_epoch': int, 'best': list, 'lists': dict, 'settings': dict}
RUN |= {'optimizer': dict, 'scaler': dict}


# Writing --------------------------------------------------------------------------------------------------


def write(state: dict, folder: Path, *names: str) -> None:
    """Write `state` under several names, in this order. Each is written beside, synced and renamed, so it is
    whole or absent whenever the process dies. Of the epochs only the last three stay. Raises OSError."""
    beside, content = folder / 'checkpoint.tmp', io.BytesIO()
    torch.save(state, content)  # into a file, a full disk would raise whatever torch trips over
    try:
        for name in names:
            with writing(folder / name):
                with open(beside, 'wb') as file:
                    file.write(content.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(beside, folder / name)
    finally:
        beside.unlink(missing_ok=True)
    if names != ('latest.pth',):
        epochs = [path for path in checkpoints_in(folder) if path.name.startswith('epoch_')]
        for path in epochs[3:]:
            if path.name not in names:  # as after going back to an earlier epoch
                path.unlink()
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some network mounts cannot sync a folder
        os.fsync(descriptor)
    os.close(descriptor)


def checkpoints_in(folder: Path) -> list[Path]:
    """A run's checkpoints in the order in which resuming tries them."""
    epochs = [path for path in folder.glob('epoch_*.pth') if path.stem[6:].isdecimal()]
    epochs.sort(key=lambda path: int(path.stem[6:]), reverse=True)
    paths = [folder / 'latest.pth', *epochs, folder / 'best.pth']
    return [path for path in paths if path.exists()]


def start_over(folder: Path) -> None:
    """Remove what a demo has left in its folder. Without its checkpoints nothing is known to be a demo's."""
    checkpoints = checkpoints_in(folder)
    if checkpoints:
        say(f'replacing the older demo in {folder}')
        for path in [*checkpoints, folder / 'bad_samples.txt']:
            path.unlink(missing_ok=True)
        os.truncate(folder / 'log.jsonl', 0)


# Reading --------------------------------------------------------------------------------------------------


def find(resume: bool, folder: Path, demo: bool = False) -> tuple[dict | None, str]:
    """The newest good checkpoint in a run's own folder, and its path; (None, '') for a new run. Damaged ones
    are named and skipped. ValueError if all are, or if the folder holds a run that is not to be resumed."""
    paths = checkpoints_in(folder)
    for path in paths:
        try:
            saved = load(path)
            if not all(isinstance(saved.get(key), kind) for key, kind in RUN.items()):
                raise ValueError(f'{path}: weights, but no run to resume; --init starts from them')
        except (OSError, ValueError) as error:
            say(f'skipping {error}')
            continue
        if resume:
            say(f'resuming from {path}')
            return saved, str(path)
        if demo and saved['settings'].get('demo'):  # `start_over` removes it
            return None, ''
        raise ValueError(f'{folder} holds a run: --resume goes on with it, --work-dir takes another folder')
    if paths:
        raise ValueError(f'{folder}: no checkpoint in it can be resumed; move them away to start afresh')
    if resume:
        say(f'nothing to resume in {folder}: starting afresh')
    return None, ''


def load(path: str | os.PathLike) -> dict:
    """Read a checkpoint, a file or what `local` fetches, as data: no code that its pickle names is run. One
    of train.py is returned as saved, others as {'model': their weights under our names}. Raises OSError, or
    ValueError if it is not a checkpoint."""
    path = local(path)
    saved = read(path)
    networks = networks_in(saved)
    if not networks:
        raise ValueError(f'{path}: no weights found in it; expected a checkpoint of train.py or of MMAction2')
    name, *others = networks
    if others:
        say(f'{path}: taking the weights in {name!r}; it also has {", ".join(map(repr, others))}')
    if sum(value.nbytes for value in networks[name].values()) > os.path.getsize(path):
        raise ValueError(f'{path}: its weights are larger than the file')
    if name != 'model' or not isinstance(saved.get('settings'), dict):
        return {'model': from_mmaction2(networks[name])}
    return saved | {'model': networks[name]}


def load_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Our state_dict from one of our checkpoints or an official one (tensors only, no code is run)."""
    return load(path)['model']


def local(path: str | os.PathLike) -> str | os.PathLike:
    """The file that `path` stands for. An http(s) address, or a name of torchvision's weights such as
    ResNet50_Weights.IMAGENET1K_V1, is fetched once into torch's hub folder. Raises OSError or ValueError."""
    url = str(path)
    if re.fullmatch(r'\w+Weights\.[A-Z0-9_]+', url) and not os.path.exists(path):
        from torchvision.models import get_weight  # takes seconds to import

        with suppress(KeyError, ValueError):  # a mistyped name is a file that is not there
            url = get_weight(url).url
    if not url.startswith(('http://', 'https://')):
        return path
    name = re.split('[?#]', url)[0].rpartition('/')[2]
    match = re.search(r'-(?!20\d{6}\.)([a-f0-9]{8,})\.', name)  # of its SHA-256; a date does not count
    if not match:  # other addresses may end in the same name
        name = f'{hashlib.sha256(url.encode()).hexdigest()[:8]}_{name}'
    target = Path(torch.hub.get_dir(), 'checkpoints', name)
    if target.exists():
        return target
    timeout = socket.getdefaulttimeout()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(30)  # torch would wait forever
        torch.hub.download_url_to_file(url, str(target), match[1] if match else None)
        read(target)  # torch does not notice when a transfer breaks off
    except Exception as error:  # of the network, the disk, the address or the hash
        target.unlink(missing_ok=True)
        raise OSError(f'{url}: cannot be fetched ({error}); you can put a copy at {target}') from None
    finally:
        socket.setdefaulttimeout(timeout)
    return target


class Inert:
    """Stands in for anything that a file names besides tensors and plain values."""

    def __init__(self, *args):
        pass

    __setstate__ = __init__


def read(path: str | os.PathLike) -> object:
    """What a file holds: tensors, plain values, and `Inert` in the place of all else. Raises OSError, or
    ValueError if it is not a whole file of `torch.save`."""
    if os.path.exists(path) and not os.path.isfile(path):  # others may never end
        raise ValueError(f'{path}: not a regular file')
    with open(path, 'rb') as file:
        is_archive = file.read(2) == b'PK'  # torch's format, except for old files
    try:
        foreign = []
        if is_archive:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
                size = sum(entry.file_size for entry in entries)
                checked = any(entry.CRC for entry in entries)  # torch can be told to leave checksums out
                # torch would unpack what could fill the memory, and read in spite of wrong checksums
                if size > os.path.getsize(path) or (checked and archive.testzip()):
                    raise ValueError
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in foreign]):
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception:  # a damaged file can raise anything
        raise ValueError(f'{path}: not a checkpoint of train.py or MMAction2, or a damaged one') from None


def networks_in(saved: object) -> dict[str, dict[str, Tensor]]:
    """The state_dicts in a file by their keys, the usual ones first; '' is the key of the file itself."""
    networks = {}
    if isinstance(saved, dict):
        for name, part in ({'model': None, 'state_dict': None, '': saved} | saved).items():
            if isinstance(part, dict):
                state = {k: v for k, v in part.items() if isinstance(k, str) and is_stored(v)}
                if state:
                    networks[name] = state
    return networks


def is_stored(value: object) -> bool:
    """Whether it is a tensor whose numbers are all there: not sparse, expanded from one, or the like."""
    if not isinstance(value, Tensor) or not value.is_cpu or value.layout != torch.strided:
        return False
    return value.nbytes <= value.untyped_storage().nbytes()


# Into a network -------------------------------------------------------------------------------------------


def fit_size(args: argparse.Namespace, saved: dict | None, path: str) -> dict | None:
    """Take the sizes that the command leaves open (None) from the run that goes on or, in a new one, from the
    checkpoint that it starts from. Returns that checkpoint, None if there is none."""
    if not saved and args.init:
        path, saved = args.init, load(args.init)
    if saved:
        sizes = SIZES | saved.get('settings', {}) | size_of(saved['model'], path)
        for key in SIZES:
            if getattr(args, key) is None:
                setattr(args, key, sizes[key])
    return saved


def size_of(state: dict[str, Tensor], path: str) -> dict:
    """The arguments of the network that has these weights. ValueError if it is not of our kind."""
    try:
        size = OmniSlowOnly.size_of(state)
        with torch.device('meta'):  # takes no memory, whatever the size
            needed = sum(value.numel() for value in OmniSlowOnly(**size).state_dict().values())
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f'{path}: {one_line(error)}') from None
    if needed > 3 * sum(value.numel() for value in state.values()):  # 2D weights are inflated threefold
        raise ValueError(f'{path}: not all weights of a network of width {size["width"]}')
    return size


def build(saved: dict, path: str) -> OmniSlowOnly:
    """The network of a checkpoint, its size read from the weights, in eval mode."""
    network = OmniSlowOnly(**size_of(saved['model'], path))
    load_into(network, saved['model'], path)
    return network.eval()


def load_into(network: nn.Module, state: dict[str, Tensor], path: str) -> None:
    """Load all weights of a network like this one. ValueError names the first that does not fit."""
    compare(state, network.state_dict(), path)
    network.load_state_dict(state)


def load_momentum(optimizer: torch.optim.Optimizer, saved: dict, path: str) -> None:
    """Copy a run's momentum into the buffers of `optimizer`, which keeps its own settings. ValueError if one
    does not fit; a fused step would write outside it."""
    for number, entry in optimizer.state_dict()['state'].items():
        own, given = entry['momentum_buffer'], None
        with suppress(IndexError, KeyError, TypeError):
            given = saved['state'][number]['momentum_buffer']
        if not is_stored(given) or given.shape != own.shape:
            raise ValueError(f'{path}: momentum {number} does not fit this network')
        own.copy_(given)


def first_weights(network: nn.Module, args: argparse.Namespace, given: dict | None, sources: list) -> None:
    """Load the checkpoint that --init names, if any, into a new run's network. Heads stay new if their
    classes differ in number, name or order, if only one side has names, or if their layers differ."""
    new = [source.name for source in sources]
    if given:
        state = given['model']
        for source in sources:
            head = network.head(source.name).state_dict(prefix=f'{source.name}_head.')
            alike = all(key in state and state[key].shape == value.shape for key, value in head.items())
            if alike and given.get(f'{source.name}_labels') == source.labels:
                new.remove(source.name)
        network.load_state_dict(matching(network, state, args.init, new), strict=False)
        say(f'starting from {args.init}; new heads: {", ".join(new) if new else "none"}')
    elif args.freeze:
        raise ValueError('--freeze needs trained weights: name them with --init')


def matching(network: nn.Module, state: dict[str, Tensor], path: str, new: list[str]) -> dict[str, Tensor]:
    """What a new run's network takes from `state`: all but the heads of the sources in `new` and parts that
    it lacks. A 1x1 kernel is divided over three frames where the network has them, as in I3D
    (https://arxiv.org/abs/1705.07750). ValueError names the first weight that does not fit."""
    heads = tuple(f'{name}_head.' for name in new)  # these stay as they are
    own = {key: value for key, value in network.state_dict().items() if not key.startswith(heads)}
    parts = {key.split('.')[0] for key in own}  # conv1, bn1, layer1, ..., video_head
    taken = {key: value for key, value in own.items() if key.endswith('num_batches_tracked')}  # unused
    trained = {key.split('_head.')[0] for key in state if '_head.' in key}  # the sources it learned from
    for key, value in state.items():
        # A source that it never learned from has statistics of 0 and 1; another's take their place.
        if trained == {'video'}:
            value = state.get(key.replace('.image_running_', '.running_'), value)
        elif trained and 'video' not in trained:
            value = state.get(key.replace('.running_', '.image_running_'), value)
        if key in own and own[key].shape[2:] == (3, 1) and value.shape[2:] == (1, 1):
            value = (value / 3).expand(-1, -1, 3, -1)
        if key.split('.')[0] in parts:
            taken[key] = value
    compare(taken, own, path)
    if images_share_statistics(taken):
        say(f'{path} has one set of running statistics; videos and images both begin with it')
    return taken


def compare(state: dict[str, Tensor], own: dict[str, Tensor], path: str) -> None:
    """ValueError names the first weight of `state` that does not fit a network whose weights are `own`."""
    for key in [*own, *state]:
        given = tuple(state[key].shape) if key in state else 'missing'
        wanted = tuple(own[key].shape) if key in own else 'none'
        if given != wanted:
            raise ValueError(f'{path}: {key} is {given}, this network has {wanted}')


def images_share_statistics(state: dict[str, Tensor]) -> bool:
    """Whether images have the running statistics of videos, as in a checkpoint from elsewhere."""
    own = [key for key in state if '.image_running_' in key]
    return bool(own) and all(torch.equal(state[key], state[key.replace('image_', '')]) for key in own)
