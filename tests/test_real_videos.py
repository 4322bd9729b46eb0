"""Pixels and scores on real videos equal the reference's.

The seven files are MMAction2's demo and test videos. They are looked for in $OMNI_MEDIA, else in
../shared/media beside the project; without them these tests are skipped.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from reference import weights

import data
import evaluate
from model import fold_batchnorm
from runtime import checkpoint

REFERENCE = Path(__file__).parent / 'reference'
MEDIA = Path(os.environ.get('OMNI_MEDIA', ROOT.parent / 'shared/media'))
EXPECTED = np.load(REFERENCE / 'eval_real_a.npz')
FILES = sorted({name.split('/')[0] for name in EXPECTED})

pytestmark = pytest.mark.skipif(not MEDIA.is_dir(), reason=f'no real videos in {MEDIA}; set OMNI_MEDIA')


@pytest.fixture(scope='module')
def network():
    """The full network with the weights of tag `a`."""
    shapes = json.loads((REFERENCE / 'state_dict_shapes.json').read_text())
    statistics = np.load(REFERENCE / 'bn_a.npz')
    official = {
        key: torch.from_numpy(
            np.asarray(statistics[key] if key in statistics else weights.tensor(key, shape, 'a'))
        )
        for key, shape in shapes.items()
    }
    network = checkpoint.build({'model': checkpoint.from_mmaction2(official)}, 'tag a')
    return fold_batchnorm(network, is_image=False)


@pytest.mark.parametrize('file', FILES)
def test_views_and_scores(file, network):
    for mode, name in (('test', 'test_views_mean'), ('val', 'val_clip_mean')):
        views = data.VideoDataset(None, mode).load(str(MEDIA / file), None)
        difference = np.abs(views.float().mean((3, 4)).numpy() - EXPECTED[f'{file}/{name}']).max()
        assert difference < 1e-4  # the reference's means are rounded to float32
        scores = evaluate.score_views(network, 'video', views, 'fp32').mean(0).numpy()
        expected = EXPECTED[f'{file}/{mode}_score']
        print(f'{file} {mode}: channel means {difference:.3f}, scores {np.abs(scores - expected).max():.2g}')
        assert scores.argmax() == expected.argmax()
        assert np.abs(scores - expected).max() < 0.001
