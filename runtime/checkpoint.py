"""Weights on disk: written whole or not at all, read as data only, the newest good ones found; also taken
from elsewhere: an address, MMAction2, a 2D ResNet. Begin with `write` and `load`.
"""

import argparse
import functools
import hashlib
import math
import os
import re
import shutil
import socket
import stat
import uuid
import warnings
import zipfile
from contextlib import suppress
from http.client import HTTPException
from operator import index
from pathlib import Path

import torch
from torch import Tensor, nn

from model import OmniSlowOnly
from runtime.distributed import say

# The names that a run gives; whatever else lies in its folder is the user's.
OURS = re.compile(r'(epoch_(\d+)|best|latest)\.pth')
# The published sizes, for checkpoints that do not say theirs
SIZES = {'layers': [3, 4, 6, 3], 'width': 64, 'size': 224, 'clip_len': 8, 'frame_interval': 8}

say_once = functools.cache(say)  # a checkpoint can be read twice


# Writing --------------------------------------------------------------------------------------------------


def write(state: dict, folder: Path, *names: str) -> None:
    """Write `state` under several names, in this order. Each is written beside, synced and renamed, so it is
    whole or absent whenever the process dies. Raises OSError if that fails; older files stay intact."""
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
        descriptor = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # some network mounts cannot sync a folder
            os.fsync(descriptor)
        os.close(descriptor)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        if 'DataLoader' in str(error):  # its signal that a worker has died can come anywhere
            raise
        reason = getattr(error, 'strerror', None) or 'writing failed'
        with suppress(OSError):
            (folder / f'{name}.tmp').unlink(missing_ok=True)
            reason += f', {shutil.disk_usage(folder).free >> 20} MB are free there'
        line = f'{folder / name} cannot be written ({reason}); the older checkpoints are intact'
        raise OSError(line) from None


def epochs(folder: Path) -> dict[int, Path]:
    """The epoch_N.pth of a folder by their number, the newest first."""
    names = [OURS.fullmatch(path.name) for path in folder.glob('epoch_*.pth')]
    numbers = sorted((int(name[2]) for name in names if name), reverse=True)
    return {number: folder / f'epoch_{number}.pth' for number in numbers}


def keep_last(folder: Path, epoch: int, count: int = 3) -> None:
    """Remove the checkpoints of epochs up to this one, except the last three."""
    for number, path in list(epochs(folder).items())[count:]:
        if number < epoch:
            with suppress(OSError):
                path.unlink()


def start_over(folder: Path) -> None:
    """Remove what a demo has left in its folder. Without its checkpoints nothing is known to be a demo's."""
    checkpoints = [path for path in folder.glob('*.pth') if OURS.fullmatch(path.name)]
    if checkpoints:
        for path in [*checkpoints, folder / 'bad_samples.txt']:
            path.unlink(missing_ok=True)
        os.truncate(folder / 'log.jsonl', 0)


# Reading --------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike) -> dict:
    """Read a checkpoint as data: no code that its pickle names is imported or run.

    `path` is a file, or what `local` fetches. A checkpoint of train.py is returned as saved, another one as
    {'model': its weights under our names}. Raises OSError, or ValueError if the file is not a checkpoint.
    """
    path = local(path)
    saved = read(path)
    networks = networks_in(saved, path)
    name, *others = networks
    if others:
        say_once(f'{path}: taking the weights in {name!r}; it also has {", ".join(map(repr, others))}')
    if sum(value.nbytes for value in networks[name].values()) > os.path.getsize(path):
        raise ValueError(f'{path}: its weights are larger than the file')
    if name == 'model' and 'settings' in saved:  # train.py's, perhaps of a network with other names
        check_values(saved, path)
        return saved | {'model': networks[name]}
    try:
        return {'model': from_mmaction2(networks[name])}
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def load_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Our state_dict from one of our checkpoints or an official one (tensors only, no code is run)."""
    return load(path)['model']


def load_run(path: str | os.PathLike) -> dict:
    """A checkpoint to resume from."""
    saved = load(path)
    needed = {'optimizer', 'scaler', 'settings', 'lists', 'step', 'steps_per_epoch', 'epoch', 'best'}
    if not needed <= saved.keys():
        raise ValueError(f'{path}: weights, but no run to resume; --init starts from them')
    return saved


def find(resume: bool, folder: Path, demo: bool = False) -> tuple[dict | None, str]:
    """The newest good checkpoint in a run's own folder, and its path; (None, '') for a new run.

    Without `resume`, a folder that holds a run is refused, but a demo replaces a demo. Raises ValueError.
    """
    saved, path = newest(folder)
    if resume:
        say(f'resuming from {path}' if saved else f'nothing to resume in {folder}: starting afresh')
        return saved, path
    if saved and not (demo and saved['settings'].get('demo')):
        raise ValueError(
            f'{folder} holds a run: the same command with --resume goes on with it, --work-dir takes another '
            'folder'
        )
    return None, ''


def newest(folder: Path) -> tuple[dict | None, str]:
    """The newest good checkpoint of a run's folder and its path; (None, '') if it holds none.

    Damaged ones are named and skipped. Raises ValueError if all are damaged.
    """
    damaged = False
    for path in [folder / 'latest.pth', *epochs(folder).values(), folder / 'best.pth']:
        try:
            return load_run(path), str(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            damaged = True
            say(f'skipping {error}')
    if damaged:
        raise ValueError(
            f'{folder}: no checkpoint in it can be resumed; move its checkpoints away to start afresh'
        )
    return None, ''


class Inert:
    """Stands in for anything that a file names besides tensors and plain values."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def read(path: str | os.PathLike) -> object:
    """What a file holds: tensors, plain values, and `Inert` in the place of all else. Raises OSError, or
    ValueError if `torch.save` did not write it."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # others may never end
        raise ValueError(f'{path}: not a regular file')
    with open(path, 'rb') as file:
        start = file.read(60)
    try:
        fault = archive_fault(path) if start.startswith(b'PK') else ''
        if not fault:
            return unpickle(path)
    except Exception:  # a damaged file can raise anything
        fault = 'not a checkpoint of train.py or MMAction2, or a damaged one'
        if not start:
            fault = 'not a checkpoint: the file is empty'
        elif not re.search(rb'[^\s -\xff]', start):  # no control characters
            text = ' '.join(start.decode(errors='ignore').split())
            fault = f'not a checkpoint, but text that begins {text!r}'
    raise ValueError(f'{path}: {fault}')


def archive_fault(path: str | os.PathLike) -> str:
    """What is wrong with a zip archive, which is torch's format; '' if nothing is."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > os.path.getsize(path):
            return 'a compressed archive, which torch.save does not write and which could fill the memory'
        # torch does not check the checksums that it writes. It can be told to leave them out.
        damaged = archive.testzip() if any(entry.CRC for entry in entries) else None
        return f'a damaged checkpoint (wrong checksum: {damaged})' if damaged else ''


def unpickle(path: str | os.PathLike) -> object:
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (OSError, ValueError):  # torch's old format
        foreign = []
    with torch.serialization.safe_globals([(Inert, name) for name in foreign]), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch's, about formats that it refuses or reads anyway
        return torch.load(path, map_location='cpu', weights_only=True)


def networks_in(saved: object, path: str | os.PathLike) -> dict[str, dict[str, Tensor]]:
    """The state_dicts in a file by their keys, those of train.py and MMAction2 first; the key of the file
    itself is ''. ValueError if there are none."""
    content = saved if isinstance(saved, dict) else {}
    networks = {}
    for name in ('model', 'state_dict', '', *content):
        part = content if name == '' else content.get(name)
        if isinstance(part, dict):
            state = {key: value for key, value in part.items() if isinstance(key, str) and is_stored(value)}
            if state:
                networks[name] = state
    if not networks:
        raise ValueError(f'{path}: no weights found in it; expected a checkpoint of train.py or of MMAction2')
    return networks


def is_stored(value: object) -> bool:
    """Whether it is a tensor whose numbers are all there: not sparse, expanded from one, or the like."""
    if not isinstance(value, Tensor) or value.is_nested or value.is_quantized or not value.is_cpu:
        return False
    return value.layout == torch.strided and value.nbytes <= value.untyped_storage().nbytes()


def check_values(saved: dict, path: str | os.PathLike) -> None:
    """ValueError if a checkpoint of train.py has values, besides tensors, that no run would save."""
    try:
        good = settings_fit(saved['settings']) and state_fits(saved)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # from a value of another type
        good = False
    if not good:
        raise ValueError(f'{path}: not a run of train.py, which would not save such values')


def settings_fit(settings: dict) -> bool:
    sizes = [index(settings.get(key, 1)) for key in ('size', 'clip_len', 'frame_interval')]
    files = [value for key, value in settings.items() if key.endswith(('_list', '_root'))]
    plain = [item for value in settings.values() for item in (value if isinstance(value, list) else [value])]
    return (
        all(0 < size < 2**16 for size in sizes)
        and all(isinstance(name, (str, type(None))) for name in files)
        and all(isinstance(item, (str, int, float, type(None))) for item in plain)
    )


def state_fits(saved: dict) -> bool:
    state = {
        'step': 0,
        'steps_per_epoch': 1,
        'epoch': 0,
        'best': [0, None],
        'scaler': {},
        'lists': {},
    } | saved
    step, steps_per_epoch, epoch = (index(state[key]) for key in ('step', 'steps_per_epoch', 'epoch'))
    top1, digests = state['best']  # of the best validation, and of its list
    labels = [value for key, value in state.items() if str(key).endswith('_labels')]
    texts = sum([value for value in [*labels, digests] if value is not None], [])
    return (
        0 <= step - epoch * steps_per_epoch <= steps_per_epoch
        and 0 <= epoch < 2**63 > steps_per_epoch > 0
        and all(isinstance(value, (int, float)) for value in [top1, *state['scaler'].values()])
        and all(isinstance(text, str) for text in texts)
        and all(len(training) == 2 for training, _ in state['lists'].values())
    )


# Into a network -------------------------------------------------------------------------------------------


def fit_size(args: argparse.Namespace, saved: dict | None, path: str) -> None:
    """Take the sizes that the command leaves open (None) from the run that goes on or, in a new one, from the
    checkpoint that it starts from."""
    missing = [key for key in SIZES if getattr(args, key) is None]
    if missing:
        if not saved:
            path = args.init if args.init else args.init_2d
            saved = load(path)
        sizes = SIZES | saved.get('settings', {}) | size_of(saved['model'], path)
        vars(args).update({key: sizes[key] for key in missing})


def size_of(state: dict[str, Tensor], path: str) -> dict:
    """The arguments of the network that has these weights. ValueError if it is not of our kind."""
    try:
        size = OmniSlowOnly.size_of(state)
    except (ValueError, TypeError) as error:
        raise ValueError(f'{path}: {error}') from None
    with torch.device('meta'):  # takes no memory, whatever the size
        needed = sum(value.numel() for value in OmniSlowOnly(**size).state_dict().values())
    if needed > 3 * sum(value.numel() for value in state.values()):  # 2D weights are inflated threefold
        raise ValueError(f'{path}: not all weights of a network of width {size["width"]}')
    return size


def build(saved: dict, path: str) -> OmniSlowOnly:
    """The network of a checkpoint, its size read from the weights, in eval mode."""
    size = size_of(saved['model'], path)
    for source in ('video', 'image'):
        names, classes = saved.get(f'{source}_labels'), size[f'{source}_classes']
        if names and len(names) != classes:
            raise ValueError(f'{path}: {len(names)} names for {classes} {source} classes')
    network = OmniSlowOnly(**size)
    load_into(network, saved['model'], path)
    return network.eval()


def load_into(network: nn.Module, state: dict[str, Tensor], path: str) -> None:
    """Load all weights of a network like this one. ValueError names the first that does not fit."""
    compare(state, network.state_dict(), path)
    network.load_state_dict(state)


def load_momentum(optimizer: torch.optim.Optimizer, saved: dict, path: str) -> None:
    """Copy a run's momentum into the buffers of `optimizer`, which keeps its own settings. ValueError if one
    does not fit; a fused step would write outside it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    for number, parameter in enumerate(parameters):
        buffer, given = optimizer.state[parameter]['momentum_buffer'], None
        with suppress(AttributeError, KeyError, TypeError):
            given = saved['state'][number]['momentum_buffer']
        if not is_stored(given) or (given.shape, given.dtype) != (buffer.shape, buffer.dtype):
            wanted = f'{tuple(buffer.shape)}, {buffer.dtype}'
            raise ValueError(f'{path}: its momentum of parameter {number} is not {wanted}')
        buffer.copy_(given)


def first_weights(network: nn.Module, args: argparse.Namespace, sources: list, steps_per_epoch: int) -> None:
    """Load the weights that a flag names into a new run's network. Raises OSError or ValueError."""
    what, new = 'a network that', [source.name for source in sources]
    if args.init_2d:
        load_2d(network, args.init_2d)
    elif args.init:
        labels = {source.name: source.labels for source in sources}
        new = load_init(network, load(args.init), args.init, labels)
    elif args.freeze:
        raise ValueError('--freeze needs trained weights: name them with --init or --init-2d')
    if args.init or args.init_2d:
        what = f'a new head ({", ".join(new)}), which'
    steps = args.epochs * steps_per_epoch
    if new and steps < 300:
        enough = math.ceil(300 / steps_per_epoch)
        say(f'{steps} steps are few for {what} learns from nothing; --epochs {enough} makes 300')


def load_init(network: nn.Module, saved: dict, path: str, labels: dict[str, list[str] | None]) -> list[str]:
    """Start from the checkpoint `saved`, read from `path`, of a network that may have other classes.

    A head whose classes differ in number, name or order stays new; so does one with class names on one side
    only. `labels` has the names of each source, if they are known. Returns the sources whose heads are new.
    """
    own, new = network.state_dict(), []
    for source in heads(own):
        shapes, given = (
            {key: value.shape for key, value in state.items() if key.startswith(f'{source}_head.')}
            for state in (own, saved['model'])
        )
        if shapes != given or labels.get(source) != saved.get(f'{source}_labels'):
            new.append(source)
    network.load_state_dict(matching(network, saved['model'], path, new), strict=False)
    with_new = f', with a new head for {" and ".join(f"{source}s" for source in new)}' if new else ''
    say(f'starting from {path}{with_new}')
    return new


def load_2d(network: nn.Module, path: str) -> None:
    """Start from a 2D ResNet's weights, or from those of an image-only run; heads stay as they are."""
    state = load(path)['model']
    network.load_state_dict(matching(network, state, path, heads(network.state_dict())), strict=False)
    say(f'starting from {path}: its backbone; the heads are new')


def matching(network: nn.Module, state: dict[str, Tensor], path: str, new: list[str]) -> dict[str, Tensor]:
    """What a new run's network takes from `state`: all but the heads of the sources in `new` and parts that
    it lacks. ValueError names the first weight that does not fit.

    A 1x1 kernel is divided evenly over three frames if the network has a temporal one, as in I3D
    (https://arxiv.org/abs/1705.07750).
    """
    own = {key: value for key, value in network.state_dict().items() if key.split('_head.')[0] not in new}
    parts = {key.split('.')[0] for key in own}
    taken = {key: value for key, value in own.items() if key.endswith('num_batches_tracked')}  # unused
    for key, value in shared_statistics(state).items():
        if key in own and is_temporal(own[key]) and value.shape[2:] == (1, 1):
            value = (value / 3).expand(-1, -1, 3, -1)
        if key.split('.')[0] in parts:
            taken[key] = value
    compare(taken, own, path)
    if len(heads(network.state_dict())) > 1 and images_share_statistics(taken):
        say(f'{path} has one set of running statistics; videos and images both begin with it')
    return taken


def compare(state: dict[str, Tensor], own: dict[str, Tensor], path: str) -> None:
    """ValueError names the first weight of `state` that does not fit a network whose weights are `own`."""
    for key, mine in own.items():
        if key not in state:
            raise ValueError(f'{path}: no weight {key}')
        given, wanted = tuple(state[key].shape), tuple(mine.shape)
        if given != wanted:
            raise ValueError(f'{path}: weight {key} is {given}, this network has {wanted}')
        if not torch.can_cast(state[key].dtype, mine.dtype):
            raise ValueError(f'{path}: weight {key} is {state[key].dtype}, this network has {mine.dtype}')
    for key in state:
        if key not in own:
            raise ValueError(f'{path}: weight {key} has no place in this network')


def heads(state: dict[str, Tensor]) -> list[str]:
    """The sources that a network has a head for."""
    return list(dict.fromkeys(key.split('_head.')[0] for key in state if '_head.' in key))


def shared_statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in which videos and images have the same running statistics if only one of them was trained.
    The other's are still 0 and 1."""
    shared, trained = {**state}, heads(state)
    for image in [key for key in state if '.image_running_' in key]:
        video = image.replace('.image_', '.')
        if trained == ['video'] and video in state:
            shared[image] = state[video]
        elif trained and 'video' not in trained:
            shared[video] = state[image]
    return shared


def images_share_statistics(state: dict[str, Tensor]) -> bool:
    """Whether images have the running statistics of videos, as in a checkpoint from elsewhere."""
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
# What DDP, torch.compile and Lightning put before names, and then MMAction2
PREFIXES = re.compile(r'((module|_orig_mod|model)\.)*(backbone\.)?')


def from_mmaction2(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of a checkpoint from elsewhere -> ours: an official one, a plain SlowOnly, a 2D ResNet,
    or ours with a prefix. If it has no image statistics, the videos' take their place.

    ValueError if two weights get the same name.
    """
    ours = {}
    for theirs, value in state_dict.items():
        key = theirs[PREFIXES.match(theirs).end() :]
        key = re.sub(r'\bconv(\d)\.(conv|bn)\.', r'\2\1.', key)  # as MMAction2's other networks have them
        key = key.replace('downsample.conv.', 'downsample.0.').replace('downsample.bn.', 'downsample.1.')
        for before, after in HEAD_NAMES.items():
            if key.startswith(before):
                key = after + key.removeprefix(before)
        if value.ndim == 5:  # (O, I, 1, kH, kW) -> (O, I, kH, kW) and (O, I, 3, 1, 1) -> (O, I, 3, 1)
            value = value.squeeze(2 if value.shape[2] == 1 else 4)
        if key in ours:
            raise ValueError(f'weights of two networks; both have {key}, one of them as {theirs}')
        ours[key] = value
    for key in [key for key in ours if '.running_' in key and '_head.' not in key]:
        ours.setdefault(key.replace('.running_', '.image_running_'), ours[key].clone())
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
    """MMAction2's name for one of our weights."""
    for theirs, mine in HEAD_NAMES.items():
        if key.startswith(mine):
            return theirs + key.removeprefix(mine)
    return f'backbone.{key}'


def is_temporal(weight: Tensor) -> bool:
    """Whether a weight of our state_dict belongs to a TemporalConv."""
    return weight.ndim == 4 and tuple(weight.shape[2:]) == (3, 1)


# From an address ------------------------------------------------------------------------------------------


def local(path: str | os.PathLike) -> str | os.PathLike:
    """The file that `path` stands for. An http(s) address, or a name of torchvision's weights such as
    ResNet50_Weights.IMAGENET1K_V1, is fetched once into torch's hub folder. Raises OSError or ValueError."""
    url = str(path)
    if re.fullmatch(r'\w+Weights\.[A-Z0-9_]+', url) and not os.path.exists(path):
        from torchvision.models import get_weight  # takes seconds to import

        try:
            url = get_weight(url).url
        except (KeyError, ValueError):
            raise ValueError(f'{path}: no such file, and torchvision has no weights of this name') from None
    if not url.lower().startswith(('http://', 'https://')):
        return path
    name = re.split(r'[?#]', url)[0].rpartition('/')[2]
    match = re.search(r'-(?!20\d{6}\.)([0-9a-f]{8,64})\.', name)  # of its SHA-256; a date does not count
    if not match:  # other addresses may end in the same name
        name = f'{hashlib.sha256(url.encode()).hexdigest()[:8]}_{name}'
    target = Path(torch.hub.get_dir(), 'checkpoints', name)
    if not target.exists():
        fetch(url, target, match[1] if match else None)
    return target


def fetch(url: str, target: Path, digits: str | None) -> None:
    """Fetch a checkpoint, whole or not at all. Its SHA-256 begins with `digits`, if they are known. OSError
    says what went wrong."""
    beside, timeout = Path(f'{target}.{uuid.uuid4().hex}.tmp'), socket.getdefaulttimeout()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(30)  # torch would wait forever
        torch.hub.download_url_to_file(url, str(beside), digits)
        networks_in(read(beside), beside)  # torch does not notice when a transfer breaks off
        os.replace(beside, target)
    except (OSError, ValueError, RuntimeError, HTTPException) as error:
        reason = str(error).replace(f'{beside}:', 'what came:')
        raise OSError(f'{url}: cannot be fetched ({reason}); you can put a copy at {target}') from None
    finally:
        socket.setdefaulttimeout(timeout)
        beside.unlink(missing_ok=True)
