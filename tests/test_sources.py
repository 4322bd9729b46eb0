"""Lists, label maps and class folders are read as people make them; what cannot be is said in one line."""

import errno
import os

import numpy as np
import pytest

import train
from runtime import sources


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(tmp_path, content, **options):
    """[(path, label)] of a list."""
    samples = sources.read_list(write(tmp_path / 'list.txt', content), str(tmp_path), **options)
    return [(os.path.relpath(samples.path(i), tmp_path), label) for i, label in enumerate(samples.labels)]


def tree(folder, *files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b'')
    return str(folder)


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ('\ufeffa b/ü clip.mp4 3\r\n\r\n  plain.avi  0  \r\n', [('a b/ü clip.mp4', 3), ('plain.avi', 0)]),
        ('abc_def 300 7\nxyz,250,1\n1.5.mp4 20 4', [('abc_def.mp4', 7), ('xyz.mp4', 1), ('1.5.mp4', 4)]),
        ('x.mp4,24,0\ny, z.MKV 30\t1', [('x.mp4', 0), ('y, z.MKV', 1)]),
        (b'x\xff.mp4 0', [('x\udcff.mp4', 0)]),
        ('bare 0\nid-8 1', [('bare.mp4', 0), ('id-8.mp4', 1)]),
    ],
)
def test_lists_of_both_forms(tmp_path, content, expected):
    assert read(tmp_path, content, videos=True) == expected


def test_images_have_one_number(tmp_path):
    assert read(tmp_path, 'photo 0\na b.jpg,1\nscan.007 2') == [('photo', 0), ('a b.jpg', 1), ('scan.007', 2)]
    with pytest.raises(ValueError, match='list.txt:1: expected "path label", as in "jump/1.mp4 0"; found'):
        read(tmp_path, 'b.jpg 24 1\n')


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (str([*range(20_000)]), ':1: expected "path label"'),  # at once
        ('a.mp4 1\nb.mp4\n', ':2: expected "path label", .* or "path num_frames label".*; found .b.mp4.'),
        ('path,label\na.mp4,0\n', ':1: expected .*; found .path,label.'),
        ('a.mp4;0\n', ':1: expected .*; found .a.mp4;0.'),
        ('a.mp4 1\n\nb.mp4 8\n', ':3: label 8 is out of range, 0 to 7'),
        ('a.mp4 -1\n', ':1: label -1 is out of range'),
        ('\n \n', ': no samples'),
        ('a.mp4 1\nb.mp4 250 5\n', ':2: expected'),
        ('a.mp4 0 3 5\n', ':1: expected'),
        ('a.mp4 1 2\nb.mp4 2 4\n', ': the first numbers are too small to count frames'),
        ('a.mp4 1\nb.mp4 2'.encode('utf-16-le'), ':1: not text in UTF-8'),
        (b'PK\x03\x04\x00\x00', ':1: not text'),
    ],
)
def test_lists_with_mistakes_name_file_and_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=f'list.txt{message}'):
        read(tmp_path, content, num_classes=8, videos=True)


def test_only_a_regular_file_is_a_list(tmp_path):
    os.mkfifo(tmp_path / 'list.txt')
    for path in (str(tmp_path / 'list.txt'), '/dev/zero'):
        with pytest.raises(ValueError, match=f'{path}: not a regular file'):
            sources.read_list(path)


def test_a_list_of_frame_folders_is_said_to_be_one(tmp_path):
    tree(tmp_path, 'clip/img_00001.jpg', 'there.mp4')
    (tmp_path / 'list.txt').write_text('clip 300 0\n')
    files = sources.read_list(str(tmp_path / 'list.txt'), str(tmp_path), videos=True)
    with pytest.raises(FileNotFoundError, match='clip: a folder, perhaps of frames; `ffmpeg -framerate 30'):
        sources.check_there(files, 'list.txt', '--video-root')
    names = [f'gone{i}.mp4' for i in range(12)] + ['there.mp4'] * 88  # some are missing: `--max-bad` counts
    files.paths = np.array([*map(os.fsencode, names)])
    files.labels = np.zeros(100, np.int64)
    sources.check_there(files, 'list.txt', '--video-root')


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ('air drumming\napplauding\n', ['air drumming', 'applauding']),
        ('applauding 1\nair drumming 0\n', ['air drumming', 'applauding']),
        ('1 applauding\n0 air drumming\n', ['air drumming', 'applauding']),
        ('1,run\n0,jump\n', ['jump', 'run']),
        ('0\ttench, Tinca\n1\tox\n', ['tench, Tinca', 'ox']),
        ('level 0\nlevel 1\nlevel 2\n', ['level 0', 'level 1', 'level 2']),
        ('level 0\nlevel 1\n', ['level 0', 'level 1']),
        ('200 m\n100 m\n', ['200 m', '100 m']),
        ('tench, Tinca\ngoldfish, Carassius\n', ['tench, Tinca', 'goldfish, Carassius']),
        ('[Something] falling\nrun\n', ['[Something] falling', 'run']),
        ('crane 0\nox 1\ncrane 2\n', ['crane 0', 'ox 1', 'crane 2']),
    ],
)
def test_label_maps(tmp_path, content, expected):
    assert sources.read_label_map(write(tmp_path / 'names.csv', content)) == expected


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{\n  "jump": 0,\n  "run": 1\n}', 'no list of class names; expected one class name a line, or'),
        ('["jump", "run"]', 'no list'),
        ('# my classes\njump\n', 'no list'),
        ('1 jump\n2 run\n', 'its lines are not numbered 0 to 1; expected'),
        ('id,name\n0,jump\n1,run\n', 'its lines are not numbered 0 to 2'),
        ('0,jump\n2,run\n', 'its lines are not numbered 0 to 1'),
        ('crane 1\nox 0\ncrane 2\n', 'its lines are not numbered'),
        ('jump\nrun\njump\n', "'jump' stands there twice"),
        ('\n', 'no list of class names'),
        ('jump\n\nrun\n', 'an empty line stands among'),
    ],
)
def test_other_label_maps_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=f'names.csv: {message}'):
        sources.read_label_map(write(tmp_path / 'names.csv', content))


def test_class_folders_that_are_numbers_are_in_their_order(tmp_path):
    folder = tree(tmp_path / 'in', *(f'{label}/1.jpg' for label in range(12)))
    assert sources.class_names(folder) == [str(label) for label in range(12)]
    labels = sources.read_list(folder)
    assert {path: label for path, label in zip(labels.paths, labels.labels)}[b'10/1.jpg'] == 10


def test_class_folders_take_what_can_be_read_and_say_what_they_leave_out(tmp_path, capsys):
    images = tree(tmp_path / 'images', 'a/x.GIF', 'a/x.cr2', 'a/x.jfif', 'a/x.ppm', 'b/c/1.JPG')
    samples = sources.read_list(images)
    assert samples.paths.tolist() == [b'a/x.jfif', b'a/x.ppm', b'b/c/1.JPG']
    assert samples.labels.tolist() == [0, 0, 1]
    assert '/images: 2 left out, such as ' in capsys.readouterr().out
    videos = tree(tmp_path / 'videos', 'a/x.M4V', 'a/x.gif', 'b/x.mkv', 'b/x.txt', 'b/x.ts')
    assert len(sources.read_list(videos, videos=True)) == 4
    assert f'1 left out, such as {videos}/b/x.txt; what is read ends in .mp4, ' in capsys.readouterr().out
    for folder in (f'{videos}/a', f'{images}/b'):  # one level too deep, and without a video
        with pytest.raises(ValueError, match=f'{folder}: no CLASS/NAME.mp4 or the like in it; a list works'):
            sources.read_list(folder, videos=True)
    tree(tmp_path / 'videos', 'z.mp4')
    with pytest.raises(ValueError, match='videos/z.mp4: not one of the 2 classes, which begin with a, b'):
        sources.read_list(videos, videos=True)


def test_folders_of_systems_are_no_classes_and_links_are_followed(tmp_path, capsys):
    inside = ('@eaDir', '__MACOSX', '.hidden', '$RECYCLE.BIN')
    hidden = [f'{parent}{name}/x.jpg' for parent in ('', 'a/', 'b/c/') for name in inside]
    folder = tree(tmp_path / 'in', 'a/1.jpg', 'ab/2.jpg', *hidden)
    (tmp_path / 'in/ab/up').symlink_to('..')
    (tmp_path / 'in/ab/loop').symlink_to('loop')
    (tmp_path / 'in/ab/other').symlink_to('../a')
    assert sources.class_names(folder) == ['a', 'ab', 'b']
    assert sources.read_list(folder).paths.tolist() == [b'a/1.jpg', b'ab/2.jpg', b'ab/other/1.jpg']
    assert ' left out, such as ' in capsys.readouterr().out


def test_folders_that_cannot_be_read_are_said(tmp_path, capsys, monkeypatch):
    folder = tree(tmp_path / 'in', 'a/1.jpg', 'b/3.jpg', 'locked/4.jpg')
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith('locked'):
            raise PermissionError(errno.EACCES, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)  # as root may read all
    assert sources.class_names(folder) == ['a', 'b', 'locked'] and len(sources.read_list(folder)) == 2
    assert capsys.readouterr().out == f'{folder}/locked: left out, Permission denied\n'


def open_sources(options):
    return sources.open_sources(train.parse_args(options.split()))


def test_a_run_begins_with_its_classes_and_their_counts(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / 'in', 'a/1.jpg', 'a/2.jpg', 'b/1.jpg', 'c/x.txt')
    open_sources('--image-only --image-list in')
    lines = ['in: 3 images of 3 classes, from c (0) to a (2)', 'in: 1 of the 3 classes have no images']
    assert capsys.readouterr().out.splitlines()[-2:] == lines
    tree(tmp_path / 'even', 'a/1.jpg', 'b/1.jpg')
    open_sources('--image-only --image-list even')
    assert capsys.readouterr().out == 'even: 2 images of 2 classes, from a (1) to b (1)\n'
    (tmp_path / 'list.txt').write_text('in/a/1.jpg 1\nin/a/2.jpg 1\nin/b/1.jpg 2\n')  # counted from 1
    open_sources('--image-only --image-list list.txt --image-root .')
    line = 'list.txt: 3 images of 3 classes, from class 0 (0) to class 1 (2)\n'
    assert capsys.readouterr().out.startswith(line)
    (tmp_path / 'names.txt').write_text('one\ntwo\n')
    with pytest.raises(ValueError, match='list.txt:3: label 2 is out of range, 0 to 1'):
        open_sources('--image-only --image-list list.txt --image-root . --image-labels names.txt')


def test_class_folders_are_not_guessed_to_be_a_lists_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / 'val', 'a/1.jpg', 'b/1.jpg')
    (tmp_path / 'list.txt').write_text('val/b/1.jpg 0\nval/a/1.jpg 1\n')
    options = '--image-only --image-list list.txt --image-root . --image-val-list val'
    with pytest.raises(ValueError, match='val: class folders .* in list.txt; --image-labels takes a file'):
        open_sources(options)
    (tmp_path / 'names.txt').write_text('b\na\n')
    (source,) = open_sources(f'{options} --image-labels names.txt')
    assert source.val.files.labels.tolist() == [1, 0]


def test_a_list_beside_class_folders_says_how_its_labels_are_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / 'train', '1/1.jpg', '2/1.jpg')
    (tmp_path / 'val.txt').write_text('train/1/1.jpg 1\n')  # perhaps meant as the class '1'
    open_sources('--image-only --image-list train --image-val-list val.txt --image-val-root .')
    assert "val.txt: taking label 0 as '1' and so on" in capsys.readouterr().out
