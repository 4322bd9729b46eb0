"""What a fork does first: a third source, and another backbone. Each is a copy of the program with the edits
below, run as commands; they break where the program moves on, and are then to be brought up to date."""

import shutil

import pytest
import torch
from conftest import ROOT, SMALL, checkpoint_in, records, run

# Another image set, `place`, with its own classes and a head of one layer. A source's name is singular, like
# `video`: its head is `place_head`, its flags --place-list and --places-per-gpu.
THIRD_SOURCE = {
    'runtime/sources.py': """
         sources.append(open_source(args, 'image', 'image_val', data.ImageDataset))
+        sources.append(open_source(args, 'place', 'place_val', data.ImageDataset))
""",
    'model.py': """
         width: int = 64,
+        place_classes: int = 0,

         self.to(memory_format=torch.channels_last)  # what makes `TemporalConv` views free of copies
+        self.place_head = nn.Linear(features, place_classes) if place_classes else None

             'width': len(state['conv1.weight']),
+            'place_classes': len(state.get('place_head.weight', ())),
""",
    'train.py': """
     add('--image-labels', 'the same for images')
+    add('--place-list', list_help, default='data/places/train.txt')
+    add('--place-root', root_help, default='data/places')
+    add('--place-val-list', 'places are validated where it is given')
+    add('--place-val-root', root_help, default='data/places')
+    add('--place-labels', 'the same for places')

     add('--images-per-gpu', 'default: in proportion to the videos, 85 to 16', type=count)
+    add('--places-per-gpu', 'the same for places', type=count)
""",
}

# torchvision's ResNet-18 over each frame, its features averaged over time. Its BatchNorms are plain ones, so
# videos and images share running statistics and nothing is folded; --layers and --width mean nothing to it.
RESNET18 = {
    'model.py': """
 import torch.nn.functional as F
+import torchvision
 from torch import Tensor, nn

-        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
-        self.bn1 = DualStatsBatchNorm(width)
-        # No stage shortens time, and only the last two look at it: at features, not at pixels.
-        self.layer1 = self._stage(width, width, layers[0], stride=1, temporal=False)
-        self.layer2 = self._stage(4 * width, 2 * width, layers[1], stride=2, temporal=False)
-        self.layer3 = self._stage(8 * width, 4 * width, layers[2], stride=2, temporal=True)
-        self.layer4 = self._stage(16 * width, 8 * width, layers[3], stride=2, temporal=True)
+        self.backbone = torchvision.models.resnet18()
+        self.backbone.fc = nn.Identity()

-        features = 32 * width
+        features = 512

-        stages = [{key.split('.')[1] for key in state if key.startswith(f'layer{i}.')} for i in range(1, 5)]
-        if not all(stages) or not {'conv1.weight', 'layer1.0.conv3.weight'} <= state.keys():
-            raise ValueError('not weights of a SlowOnly or another ResNet with bottlenecks')

-            'layers': [len(blocks) for blocks in stages],
-            'width': len(state['conv1.weight']),
+            'layers': [2, 2, 2, 2],
+            'width': 64,

-        x = F.relu(self.bn1(self.conv1(x), is_image))
-        x = F.max_pool2d(x, 3, stride=2, padding=1)
-        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
-            for block in stage:
-                x = block(x, frames, is_image)
-        return x.mean((2, 3)).unflatten(0, (-1, frames)).mean(1)  # (B*T, C, H, W) -> (B*T, C) -> (B, C)
+        return self.backbone(x).unflatten(0, (-1, frames)).mean(1)  # (B*T, 512) -> (B, 512)
"""
}

OPTIONS = f'{SMALL} --workers 0 --val-list video_val.txt'


@pytest.fixture
def fork(demo, tmp_path, monkeypatch):
    """A function that makes a copy of the program, with {file: edits}, and gives back its folder. Edits are
    written as a diff, with a blank line between places."""
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')  # bits are compared

    def make(edits):
        (tmp_path / 'runtime').mkdir()
        for path in [*ROOT.glob('*.py'), *ROOT.glob('runtime/*.py')]:
            shutil.copy(path, tmp_path / path.relative_to(ROOT))
        for file, places in edits.items():
            text = (tmp_path / file).read_text()
            for place in places.strip('\n').split('\n\n'):
                lines = place.splitlines()
                old, new = ('\n'.join(line[1:] for line in lines if line[0] in kept) for kept in (' -', ' +'))
                assert text.count(f'\n{old}\n') == 1, f'{file} has no longer, or no longer once:\n{old}'
                text = text.replace(f'\n{old}\n', f'\n{new}\n')
            (tmp_path / file).write_text(text)
        for name in ('data', 'few.txt'):
            (tmp_path / name).symlink_to(demo / name)
        lines = (demo / 'data/demo/video_val.txt').read_text().splitlines()[:8]
        (tmp_path / 'video_val.txt').write_text('\n'.join(lines))
        return tmp_path

    return make


def test_a_third_source(fork):
    folder = fork(THIRD_SOURCE)
    for split in ('train', 'val'):  # images of the demo, their classes counted backwards
        pairs = map(str.split, (folder / f'data/demo/image_{split}.txt').read_text().splitlines())
        lines = [f'{path} {3 - int(label)}' for path, label in pairs]
        (folder / f'place_{split}.txt').write_text('\n'.join(lines))
    names = (folder / 'data/demo/image_labels.txt').read_text().split()[::-1]
    (folder / 'place_labels.txt').write_text('\n'.join(names))
    options = (
        f'{OPTIONS} --epochs 2 --videos-per-gpu 4 --images-per-gpu 5 --places-per-gpu 2 --log-interval 1 '
        '--place-list place_train.txt --place-root data/demo/images_train --place-labels place_labels.txt '
        '--place-val-list place_val.txt --place-val-root data/demo/images_val'
    )
    line = f'./train.py {options} --val-interval 1 --work-dir run'
    output = run(line, folder, ranks=2).stdout
    assert '2 x 5 images and 2 x 2 places' in output
    steps, validations = records(folder / 'run', 'step'), records(folder / 'run', 'mode')
    assert len(steps) == 4 and len(validations) == 2
    assert all(0 < r['place_loss'] < r['loss'] and 0 <= r['place_top1'] <= 1 for r in steps)
    assert {'video_top1', 'image_top1', 'place_top1'} < validations[0].keys()

    whole = checkpoint_in(folder / 'run')
    assert whole['place_labels'] == names and whole['model']['place_head.bias'].shape == (4,)
    (folder / 'run/epoch_1.pth').replace(folder / 'run/latest.pth')
    output = run(f'{line} --resume', folder, ranks=2).stdout
    assert 'resuming from run/latest.pth' in output and '8 videos of 8 classes, 10 clips x 3 crops' in output
    resumed = checkpoint_in(folder / 'run')
    assert resumed['best'] == whole['best']
    for part in ('model', 'optimizer'):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)


def test_another_backbone(fork):
    folder = fork(RESNET18)
    options = f'{OPTIONS} --epochs 1 --videos-per-gpu 4 --work-dir run'
    output = run(f'./train.py {options}', folder, ranks=2).stdout
    assert 'epoch 1/1 step 2/2' in output and 'validation  video_top1' in output and 'image_top1' in output
    assert '8 videos of 8 classes, 10 clips x 3 crops' in output and '12 images of 4 classes' in output
    assert checkpoint_in(folder / 'run')['model']['backbone.layer4.1.conv2.weight'].shape == (512, 512, 3, 3)
    clip, photo = 'data/demo/videos_val/dots_falling_000.mp4', 'data/demo/images_val/dots_000.jpg'
    output = run(f'./evaluate.py --ckpt run/best.pth --clips 2 --workers 0 {clip} {photo}', folder).stdout
    assert f'{clip} (video)\n' in output and f'{photo} (image)\n' in output
