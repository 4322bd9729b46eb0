"""Weights on disk: written whole or not at all, read as data only, the newest good ones found; also taken
from elsewhere: an address, MMAction2, a 2D ResNet. Begin with `write` and `load`.
"""

import argparse
import hashlib
import math
import os
import re
import shutil
import socket
import uuid
import warnings
import zipfile
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn

from model import OmniSlowOnly
from runtime.distributed import say

# The names that a run gives; whatever else lies in its folder is the user's.
OURS = re.compile(r'(epoch_(\d+)|best|latest)\.pth')


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
        with suppress(OSError):  # some network mounts cannot sync a folder, Windows cannot open it
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
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


def ours(folder: Path) -> list[Path]:
    """The checkpoints of a folder, by their names."""
    return [path for path in folder.glob('*.pth') if OURS.fullmatch(path.name)]


def epochs(folder: Path) -> dict[int, Path]:
    """The epoch_N.pth of a folder by their number, the newest first."""
    numbers = {path: OURS.fullmatch(path.name)[2] for path in ours(folder)}
    return dict(sorted(((int(n), path) for path, n in numbers.items() if n), reverse=True))


def keep_last(folder: Path, epoch: int, count: int = 3) -> None:
    """Remove the checkpoints of epochs up to this one, except the last three."""
    for number, path in list(epochs(folder).items())[count:]:
        if number < epoch:
            with suppress(OSError):
                path.unlink()


def start_over(folder: Path) -> None:
    """Remove what a run has left in its folder."""
    for path in [*ours(folder), folder / 'bad_samples.txt']:
        path.unlink(missing_ok=True)
    os.truncate(folder / 'log.jsonl', 0)


# Reading --------------------------------------------------------------------------------------------------


class Inert:
    """Stands in for anything that a file names besides tensors and plain values."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def load(path: str | os.PathLike) -> dict:
    """Read a checkpoint as data: no code that its pickle names is imported or run.

    `path` is a file, or what `local` fetches. A checkpoint of train.py is returned as saved; in others, the
    weights are renamed to ours. Raises OSError, or ValueError if the file is not a checkpoint.
    """
    path, damaged = local(path), None
    if os.path.isdir(path):
        newest_last = sorted(ours(Path(path)), key=lambda file: file.stat().st_mtime)
        found = f'its newest checkpoint is {newest_last[-1]}' if newest_last else 'no checkpoint is in it'
        raise ValueError(f'{path}: a folder; {found}')
    with open(path, 'rb') as file:  # any OSError below means a damaged file
        start = file.read(60)
    try:
        try:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except (OSError, ValueError):  # not there, or in torch's old format
            foreign = []
        with torch.serialization.safe_globals([(Inert, name) for name in foreign]), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch's, about formats that it refuses or reads anyway
            saved = torch.load(path, map_location='cpu', weights_only=True)
        if zipfile.is_zipfile(path):  # torch does not check the checksums that it writes
            with zipfile.ZipFile(path) as archive:
                written = any(info.CRC for info in archive.infolist())  # torch can be told to leave them out
                damaged = archive.testzip() if written else None
    except Exception:  # a damaged file can raise anything
        what = ' of train.py or MMAction2, or a damaged one' if start else ': the file is empty'
        if start and not re.search(rb'[^\s -\xff]', start):  # no control characters
            what = f', but text that begins {" ".join(start.decode(errors="ignore").split())!r}'
        raise ValueError(f'{path}: not a checkpoint{what}') from None
    if damaged:
        raise ValueError(f'{path}: a damaged checkpoint (wrong checksum: {damaged})')
    saved = saved if isinstance(saved, dict) else {}
    for state in (saved.get('model'), saved.get('state_dict'), saved, *saved.values()):
        if isinstance(state, dict) and any(isinstance(value, Tensor) for value in state.values()):
            break
    else:
        raise ValueError(f'{path}: no weights found in it; expected a checkpoint of train.py or of MMAction2')
    rest = saved if state is saved.get('model') else {}
    if 'settings' not in rest:  # else train.py's own, perhaps of a network that has other names
        state = from_mmaction2({str(key): value for key, value in state.items() if isinstance(value, Tensor)})
    return rest | {'model': state}


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
    digits = re.search(r'-(?!20\d{6}\.)([0-9a-f]{8,64})\.', name)  # of its SHA-256; a date does not count
    if not digits:  # other addresses may end in the same name
        name = f'{hashlib.sha256(url.encode()).hexdigest()[:8]}_{name}'
    target = Path(torch.hub.get_dir(), 'checkpoints', name)
    if target.exists():
        if digits and not hashlib.sha256(target.read_bytes()).hexdigest().startswith(digits[1]):
            raise ValueError(
                f'{target}: its SHA-256 does not begin with {digits[1]}; remove it to fetch it again'
            )
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    beside, timeout = Path(f'{target}.{uuid.uuid4().hex}.tmp'), socket.getdefaulttimeout()
    try:
        if not target.exists():
            socket.setdefaulttimeout(30)  # torch would wait forever
            torch.hub.download_url_to_file(url, str(beside), digits and digits[1])
            load(beside)  # torch does not notice when a transfer breaks off
            os.replace(beside, target)
    except (OSError, ValueError, RuntimeError, HTTPException) as error:
        reason = str(error).replace(f'{beside}:', 'what came:')
        raise OSError(f'{url}: cannot be fetched ({reason}); you can put a copy at {target}') from None
    finally:
        socket.setdefaulttimeout(timeout)
        beside.unlink(missing_ok=True)
    return target


def load_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Our state_dict from one of our checkpoints or an official one (tensors only, no code is run)."""
    return load(path)['model']


def load_run(path: str | os.PathLike) -> dict:
    """A checkpoint to resume from."""
    saved = load(path)
    if not {'optimizer', 'settings', 'step', 'lists'} <= saved.keys():  # an older version had no step
        raise ValueError(f'{path}: weights, but no run to resume; --init starts from them')
    return saved


def find(resume: str | None, folder: Path, demo: bool = False) -> tuple[dict | None, str]:
    """The checkpoint that a run resumes from, and its path; (None, '') for a new run.

    `resume` is 'auto', the newest good checkpoint in the run's own folder, or a checkpoint from elsewhere: a
    run then goes on in its own folder, and the same command, started again, goes on with that run. Without
    `resume`, a folder that holds a run is refused, but a demo replaces a demo. Raises OSError or ValueError.
    """
    saved, path = newest(folder)
    own = saved and resume and os.path.realpath(resume) == os.path.realpath(path)
    if resume == 'auto' or own or saved and resume and saved['settings']['resume'] == resume:
        say(f'resuming from {path}' if saved else f'nothing to resume in {folder}: starting afresh')
        return saved, path
    if saved and not (demo and not resume and saved['settings'].get('demo')):
        raise ValueError(
            f'{folder} holds a run: the same command with --resume goes on with it, --work-dir takes another '
            'folder'
        )
    if resume:
        saved, path = load_run(resume), resume
        say(f'resuming from {path}, into {folder}')
        return saved, path
    return None, ''


def newest(folder: Path) -> tuple[dict | None, str]:
    """The newest good checkpoint of a run's folder and its path; (None, '') if it holds none.

    Damaged ones are named and skipped. Raises ValueError if all are damaged.
    """
    damaged = 0
    for path in [folder / 'latest.pth', *epochs(folder).values(), folder / 'best.pth']:
        try:
            return load_run(path), str(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            damaged += 1
            say(f'skipping {error}')
    if damaged:
        raise ValueError(
            f'{folder}: no checkpoint in it can be resumed; move its checkpoints away to start afresh'
        )
    return None, ''


# Into a network -------------------------------------------------------------------------------------------


def fit_size(args: argparse.Namespace, saved: dict | None) -> None:
    """If the command line leaves --layers and --width open, take those of the weights to start from."""
    if not (args.layers and args.width):
        state = (saved or load(args.init or args.init_2d))['model']
        size = {'layers': [3, 4, 6, 3], 'width': 64} | architecture(state)
        args.layers, args.width = args.layers or size['layers'], args.width or size['width']


def first_weights(network: nn.Module, args: argparse.Namespace, sources: list, steps_per_epoch: int) -> None:
    """Load the weights that a flag names into a new run's network. Raises OSError or ValueError."""
    new = []
    if args.init_2d:
        load_2d(network, args.init_2d)
        new = heads(network)
    elif args.init:
        labels = {source.name: source.labels for source in sources}
        new = load_init(network, load(args.init), args.init, labels)
    elif args.freeze:
        raise ValueError('--freeze needs trained weights: name them with --init or --init-2d')
    steps, scratch = args.epochs * steps_per_epoch, not (args.init or args.init_2d)
    if steps < 300 and (new or scratch):
        what = 'a network that' if scratch else f'a new head ({", ".join(new)}), which'
        enough = math.ceil(300 / steps_per_epoch)
        say(f'{steps} steps are few for {what} learns from nothing; --epochs {enough} makes 300')


def build(saved: dict, path: str) -> OmniSlowOnly:
    """The network of a checkpoint, its size read from the weights, in eval mode."""
    try:
        network = OmniSlowOnly(**OmniSlowOnly.size_of(saved['model']))
    except (ValueError, TypeError):
        first = next(iter(saved['model']))
        raise ValueError(f'{path}: weights of a network other than SlowOnly; the first is {first}') from None
    load_into(network, saved['model'], path)
    return network.eval()


def load_into(network: nn.Module, state: dict[str, Tensor], path: str) -> None:
    """Load all weights of a network like this one. ValueError names the first that does not fit."""
    network.load_state_dict(matching(network, state, path))


def load_init(network: nn.Module, saved: dict, path: str, labels: dict[str, list[str] | None]) -> list[str]:
    """Start from the checkpoint `saved`, read from `path`, of a network that may have other classes.

    A head whose classes differ in number, name or order stays new; `labels` has the class names of each
    source, if they are known. Returns the sources whose heads are new.
    """
    new = []
    for source in heads(network):
        own, given = (
            {key: value.shape for key, value in state.items() if key.startswith(f'{source}_head.')}
            for state in (network.state_dict(), saved['model'])
        )
        names = [labels.get(source), saved.get(f'{source}_labels')]
        if own != given or all(names) and names[0] != names[1]:
            new.append(source)
    network.load_state_dict(matching(network, saved['model'], path, new), strict=False)
    with_new = f', with a new head for {" and ".join(f"{source}s" for source in new)}' if new else ''
    say(f'starting from {path}{with_new}')
    return new


def load_2d(network: nn.Module, path: str) -> None:
    """Start from a 2D ResNet's weights, or from those of an image-only run; heads stay as they are."""
    state = load(path)['model']
    network.load_state_dict(matching(network, state, path, heads(network), inflate=True), strict=False)
    say(f'starting from {path}: its backbone; the heads are new')


def inflate_2d(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Backbone weights for `network` from a 2D ResNet with torchvision's key names, with or without a prefix.
    ValueError names the first weight that is missing or of another shape."""
    return matching(network, from_mmaction2(state), 'the 2D network', heads(network), inflate=True)


def heads(network: nn.Module) -> list[str]:
    """The sources that a network has a head for."""
    return list(dict.fromkeys(key.split('_head.')[0] for key in network.state_dict() if '_head.' in key))


def matching(network: nn.Module, state: dict, path: str, fresh: list | None = None, inflate=False) -> dict:
    """The weights that `network` takes from `state`; ValueError names the first weight at fault.

    Without `fresh`, both must have the same weights. With it, a new run starts: the heads of these sources
    keep their weights, parts that the network lacks are ignored, and if `state` is of images only, videos
    get its image statistics. With `inflate`, a 1x1 kernel is divided evenly over the three frames where the
    network has a temporal one, as in I3D (https://arxiv.org/abs/1705.07750).
    """
    starts, is_2d, taken, faults = fresh is not None, False, {}, []
    images_only = starts and not any(key.startswith('video_head.') for key in state)
    own = {k: v for k, v in network.state_dict().items() if k.split('_head.')[0] not in (fresh or ())}
    for key, mine in own.items():
        of_images = key.replace('.running_', '.image_running_')
        value = state.get(of_images if images_only and of_images in state else key)
        if value is None:
            if not (starts and key.endswith('num_batches_tracked')):  # unused, as there is a momentum
                faults.append(f'no weight {key}')
            continue
        if is_temporal(mine) and value.shape[2:] == (1, 1):
            is_2d = True
            if inflate:
                value = (value / 3).expand(-1, -1, 3, -1)
        if value.shape != mine.shape:
            faults.append(f'weight {key} is {tuple(value.shape)}, this network has {tuple(mine.shape)}')
        taken[key] = value
    parts = {key.split('.')[0] for key in own}
    for key in state:
        if key not in own and (not starts or key.split('.')[0] in parts):
            faults.append(f'weight {key} has no place in this network')
    if faults:
        hint, size = '', architecture(state)
        if is_2d and not inflate:
            hint = '; it is a 2D ResNet, which train.py --init-2d takes'
        elif not starts and 'cls_head.fc_cls.weight' in state:
            hint = '; its head is a single linear layer; train.py --init takes only the backbone'
        if size and size != architecture(own) != {}:
            hint += f'; it needs --width {size["width"]} --layers {" ".join(map(str, size["layers"]))}'
        raise ValueError(f'{path}: {faults[0]}{hint or "; it is of another network"}')
    return taken


def architecture(state: dict[str, Tensor]) -> dict:
    """{'layers': [3, 4, 6, 3], 'width': 64} as read from the weights; {} if they are of another network."""
    stages = [{key.split('.')[1] for key in state if key.startswith(f'layer{i}.')} for i in range(1, 5)]
    stem, last = state.get('conv1.weight'), state.get('layer1.0.conv3.weight')
    if not all(stages) or stem is None or last is None or last.shape[:2] != (4 * len(stem), len(stem)):
        return {}
    return {'layers': [len(blocks) for blocks in stages], 'width': len(stem)}


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
# What DDP, torch.compile, FSDP and activation checkpointing insert into names, wherever they wrap
WRAPPERS = r'\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.'


def from_mmaction2(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of a checkpoint from elsewhere -> ours: an official one, a plain SlowOnly, a 2D ResNet,
    or ours with a prefix such as `module.` or `model.`

    If it has no image statistics, the videos' take their place.
    """
    state = {re.sub(WRAPPERS, '', key): value for key, value in state_dict.items()}
    stems = (re.fullmatch(r'((?:(?!layer\d)\w+\.)*)conv1\.(conv\.)?weight', key) for key in state)
    before = next((stem[1].split('.')[:-1] for stem in stems if stem), [])  # ['model', 'backbone'], say
    ours = {}
    for key, value in state.items():
        for part in (*before, 'backbone'):
            key = key.removeprefix(f'{part}.')
        key = re.sub(r'\bconv(\d)\.(conv|bn)\.', r'\2\1.', key)  # as MMAction2's other networks have them
        key = key.replace('downsample.conv.', 'downsample.0.').replace('downsample.bn.', 'downsample.1.')
        for theirs, mine in HEAD_NAMES.items():
            if key.startswith(theirs):
                key = mine + key.removeprefix(theirs)
        if value.ndim == 5:  # (O, I, 1, kH, kW) -> (O, I, kH, kW) and (O, I, 3, 1, 1) -> (O, I, 3, 1)
            value = value.squeeze(2 if value.shape[2] == 1 else 4)
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
