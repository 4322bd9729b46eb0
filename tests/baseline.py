"""What anybody would write for a few clips of their own: torchvision's ResNet, one block a stage, on single
frames; the logits are averaged over a clip. docs/own_clips.md compares it with this program.

    python tests/baseline.py my_videos my_videos_val --steps 840
"""

import argparse
import json
import random
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.transforms import v2


def load(folder: str, classes: list[str], size: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """32 frames spread over each clip of a folder of class folders, uint8 (32, 3, H, W), and the labels."""
    small, clips, labels = v2.Resize(2 * size, antialias=True), [], []
    for label, name in enumerate(classes):
        for path in sorted(Path(folder, name).glob('*')):
            with av.open(str(path)) as container:
                frames = list(container.decode(video=0))
            picked = [frames[i] for i in np.linspace(0, len(frames) - 1, 32).round().astype(int)]
            pixels = [torch.from_numpy(frame.to_ndarray(format='rgb24')).permute(2, 0, 1) for frame in picked]
            clips.append(torch.stack([small(frame) for frame in pixels]))
            labels.append(label)
    return clips, torch.tensor(labels)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('train')
    parser.add_argument('val')
    parser.add_argument('--steps', type=int, default=840)
    parser.add_argument('--size', type=int, default=56)
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--lr', type=float, default=0.01)
    parser.add_argument('--no-flip', action='store_true')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    classes = sorted(path.name for path in Path(args.train).iterdir() if path.is_dir())
    clips, labels = load(args.train, classes, args.size)
    val_clips, val_labels = load(args.val, classes, args.size)
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(args.size, (0.4, 1), antialias=True),
            v2.RandomHorizontalFlip(0 if args.no_flip else 0.5),
        ]
    )
    plain = v2.Compose([v2.Resize(args.size * 8 // 7, antialias=True), v2.CenterCrop(args.size)])
    network = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=len(classes))
    optimizer = torch.optim.SGD(network.parameters(), args.lr, 0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)

    def logits_of(clips: list[torch.Tensor]) -> torch.Tensor:  # of each (8, 3, H, W) -> (B, classes)
        x = (torch.stack(clips).flatten(0, 1) - 117) / 58
        return network(x).unflatten(0, (-1, 8)).mean(1)

    order, hits = [], []
    for _ in range(args.steps):
        if len(order) < args.batch:
            order = random.sample(range(len(labels)), len(labels))
        batch, order = order[: args.batch], order[args.batch :]
        frames = [[4 * t + random.randrange(4) for t in range(8)] for _ in batch]
        logits = logits_of([augment(clips[i][picked]) for i, picked in zip(batch, frames)])
        hits += (logits.argmax(1) == labels[batch]).tolist()
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[batch]).backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        predicted = torch.cat([logits_of([plain(clip[2::4])]) for clip in val_clips]).argmax(1)
    train, val = np.mean(hits[-2 * len(labels) :]), (predicted == val_labels).float().mean().item()
    print(json.dumps(vars(args) | {'train_top1': round(train, 4), 'val_top1': round(val, 4)}))


if __name__ == '__main__':
    main()
