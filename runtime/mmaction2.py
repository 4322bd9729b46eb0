"""MMAction2's formats: its checkpoints, there and back, and its result file."""

import pickle
import re

import numpy as np
import torch
from torch import Tensor

from runtime.command import whole_file

# The backbone has the key names of torchvision's ResNet; MMAction2 puts `backbone.` before them. The heads:
HEAD_NAMES = {
    'cls_head.fc2d.2.': 'image_head.0.',
    'cls_head.fc2d.4.': 'image_head.2.',
    'cls_head.fc3d.2.': 'video_head.0.',
    'cls_head.fc3d.3.': 'video_head.1.',
    'cls_head.fc3d.6.': 'video_head.4.',
    'cls_head.fc_cls.': 'video_head.0.',  # a single linear layer
}


def from_mmaction2(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of a checkpoint from elsewhere -> ours: an official one, a plain SlowOnly, a 2D ResNet,
    or ours with a prefix. If it has no image statistics, the videos' take their place."""
    ours = {}
    for theirs, value in state_dict.items():
        # What DDP, torch.compile and Lightning put before names, and then MMAction2
        key = re.sub(r'^((module|_orig_mod|model)\.)*(backbone\.)?', '', theirs)
        key = re.sub(r'\bconv(\d)\.(conv|bn)\.', r'\2\1.', key)  # as MMAction2's other networks have them
        key = key.replace('downsample.conv.', 'downsample.0.').replace('downsample.bn.', 'downsample.1.')
        for their_head, our_head in HEAD_NAMES.items():
            key = key.replace(their_head, our_head)
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
        if 'image_running_' in key:
            continue
        if 'video_head.4.weight' not in state_dict:
            key = key.replace('video_head.0.', 'cls_head.fc_cls.')
        for their_head, our_head in HEAD_NAMES.items():
            key = key.replace(our_head, their_head)
        if not key.startswith('cls_head.'):
            key = f'backbone.{key}'
        if value.ndim == 4:
            value = value.unsqueeze(4 if value.shape[2:] == (3, 1) else 2)
        theirs[key] = value
    return theirs


def write_dump(path: str, scores: np.ndarray, labels: np.ndarray, size: int) -> None:
    """Write MMAction2's result file: a pickled list, in dataset order, of dicts of tensors. An unreadable
    sample scores -1 for its own label and 0 for the others, so that it counts as wrong there too."""
    results = []
    for row, label in zip(scores, labels):
        if np.isnan(row[0]):
            row = np.where(np.arange(len(row)) == label, np.float32(-1), np.float32(0))
        results.append(
            {
                'pred_score': torch.from_numpy(row.copy()),
                'pred_label': torch.tensor([int(row.argmax())]),
                'gt_label': torch.tensor([int(label)]),
                'num_classes': len(row),
                'img_shape': (size, size),
            }
        )
    with whole_file(path) as file:
        pickle.dump(results, file)
