"""The comparison: its figures in the docs, and its runs."""

import json
from pathlib import Path

import claim
import numpy as np
import pytest
from conftest import DOCS

RECORDS = Path(__file__).parent / 'reference/claim.jsonl'


def test_the_docs_show_what_was_recorded():
    for title, header, rows in claim.tables(claim.read(RECORDS)):
        for row in [header, *rows]:
            assert f'| {" | ".join(row)} |' in DOCS, title


def test_a_row_of_the_tables_calculated_without_them():
    """With 4 videos per class: the rates that seeds 10 to 12 choose, and what the other ten show."""
    size = {'videos_per_class': 4, 'images_per_look': 8, 'image_batch': 32}
    records = [r for r in map(json.loads, RECORDS.read_text().splitlines()) if r == r | size]
    cells, of = {'top1': [], 'image_top1': []}, {}
    for way in ('videos only', 'images first', 'jointly', 'images first, then jointly'):
        own = [r for r in records if r['way'] == way]
        rates = {r['lr']: [q['top1'] for q in own if q['lr'] == r['lr'] and q['seed'] > 9] for r in own}
        rate = max((lr for lr in rates if len(rates[lr]) == 3), key=lambda lr: sum(rates[lr]))
        for metric in cells if way != 'videos only' else ['top1']:
            found = {r['seed']: 100 * r[metric] for r in own if r['lr'] == rate}
            of[way, metric] = np.array([found[seed] for seed in range(10)])
            cells[metric].append(f'{of[way, metric].mean():.1f} ± {of[way, metric].std(ddof=1):.1f}')
    assert f'| 4 | {" | ".join(cells["top1"])} |' in DOCS
    assert f' | {" | ".join(cells["image_top1"])} |' in DOCS
    for metric in cells:
        both, first = of['images first, then jointly', metric], of['images first', metric]
        assert f' | {np.mean(both - first):+.1f} [' in DOCS


def test_the_comparison_repeats_and_no_frame_tells(tmp_path, monkeypatch):
    """Two steps in each way, twice; and each look is in as many classes as any other, so that a frame shows
    which four they may be."""
    assert sorted(look for pair in claim.PAIRS for look in pair) == sorted(4 * list(range(8)))
    assert len({frozenset(pair) for pair in claim.PAIRS}) == 16
    for setting, value in (('STEPS', 2), ('HELD_OUT', 1), ('EVEN_STEPS', 2)):
        monkeypatch.setattr(claim, setting, value)
    for way in claim.WAYS:
        job, folders = claim.Job(way, 2, lr=0.1, image_batch=8), [tmp_path / f'{way}{i}' for i in range(2)]
        for folder in folders:
            folder.mkdir()
        first, again = (claim.run(folder, job) for folder in folders)
        assert first | {'seconds': 0} == again | {'seconds': 0} and 0 <= first['top1'] <= 1
        assert ('image_top1' in first) == (way != 'videos only')
        assert ('image_before' in first) == ('first' in way)


def test_intervals_are_student_s():
    """Of ten values and of five, by the table of Student (1908) and by hand."""
    assert claim.interval(np.arange(10.0)) == pytest.approx((2.3342, 6.6658), abs=1e-3)
    assert claim.interval(np.arange(5.0)) == pytest.approx((0.0370, 3.9630), abs=1e-3)
    assert claim.interval(np.full(10, 0.3)) == pytest.approx((0.3, 0.3))
