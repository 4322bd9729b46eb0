"""Whether the tests protect the program: on a copy of it with one of 40 faults, a test has to fail.
python tests/mutate.py [N ...] [-- PYTEST ARGUMENTS]
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic

FAULTS = r"""
model.py | BatchNorm moves ten times as fast | MOMENTUM = 0.01 => MOMENTUM = 0.1
model.py | first steps do not count evenly | max(1 / (step + 1), => max(0,
model.py | an image meets the middle tap only | self.weight.sum(2, keepdim=True) => self.weight[:, :, 1:2]
model.py | pixels from 0 to 1 pass | if x.max() <= 1: => if False:
video.py | no video is turned | (True, b < 0, c < 0) if => (False, False, False) if
video.py | frames are in the order of the file | place = np.argsort(pts) => place = np.arange(len(pts))
video.py | a wrong key frame is sought | before if packet.pts < pts[latest] else latest => latest
video.py | times that lie are believed | require(shown == sorted(set(order))) => require(True)
video.py | playlists are opened | {'format_whitelist': FORMATS, => {
runtime/headers.py | a rotation in a message is lost | (0, 1, 4, 5, 6, => (0, 1, 4, 5, 6, 47,
data.py | the last clip is never drawn | frame_interval, 0) + 1 => frame_interval, 1)
data.py | height, width swapped | (*frame.shape[:2], rng, => (*frame.shape[1::-1], rng,
data.py | no video is mirrored | clip = clip.flip(-1) => pass
data.py | every epoch augments alike | {what}', self.seed, nth_pass, index) => {what}', self.seed, index)
data.py | what an epoch leaves over is drawn | epoch * self.sizes[source] + => epoch * 0 +
data.py | replacements are not seeded | replacements.integers(len(self)) => np.random.randint(len(self))
data.py | a replacement has another's label | files.labels[index] => files.labels[0]
runtime/distributed.py | SIGTERM saves nothing | [signal.SIGTERM, signal.SIGINT => [signal.SIGINT
runtime/distributed.py | two runs share a folder | not isinstance(error, (B => not isinstance(0, (B
runtime/checkpoint.py | written in place | folder / 'checkpoint.tmp' => folder / names[0]
runtime/checkpoint.py | a download's hash is ignored | target), match[1] if match else None) => target))
runtime/checkpoint.py | a checkpoint's code is run | weights_only=True => weights_only=False
runtime/mmaction2.py | a weight has a wrong name | cls_head.fc3d.6. => cls_head.fc3d.5.
runtime/checkpoint.py | images begin with 0 and 1 | trained == {'video'} => trained == {'x'}
runtime/sources.py | lines are counted from 0 | enumerate(file, 1) => enumerate(file, 0)
runtime/guard.py | the exit status is the signal | sys.exit(128 + signum) => sys.exit(signum)
runtime/guard.py | unreadable files are not counted | is_due, len(bad), drawn, => is_due, 0, drawn,
runtime/log.py | a resumed run begins its log anew | os.devnull, 'a', => os.devnull, 'w',
runtime/log.py | the losses are those of one rank | distributed.average([means]) => pass
runtime/command.py | a file that kills a process is good | 'its process died => '' and 'its process died
prepare.py | encode writes in place | part = f'{target}.part' => part = target
flops.py | a multiply-accumulate counts as two | get_total_flops() // 2 => get_total_flops()
evaluate.py | logits are averaged | logits.float().softmax(1) => logits.float()
evaluate.py | images are folded with the videos' | if is_image: => if False:
evaluate.py | --show draws the wrong pictures | dataset[int(i)].pixels => dataset[len(rows)].pixels
train.py | the warm-up ends a step late | / max(warmup - 1, 1) => / max(warmup, 1)
train.py | every step drops out alike | args.seed, step, n) => args.seed, n)
train.py | gradients are not clipped | s(), clip_norm) => s(), math.inf)
train.py | the last batch's statistics count | alpha=1 / len(batches) => alpha=1
train.py | a resumed run leaves out a step | saved['step'] * steps => (saved['step'] + 1) * steps
""".strip().splitlines()  # file | what is wrong | text => what it becomes


def failing(file: str, old: str = '', new: str = '') -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        os.system(f'git ls-files -z | tar -c --null -T - | tar -x -C {folder}')
        Path(folder, file).write_text(Path(file).read_text().replace(old, new))
        line = ['env', 'OMP_NUM_THREADS=1', sys.executable, *'-m pytest -x -q -p no:cacheprovider'.split()]
        output = subprocess.run([*line, *sys.argv[end:]], cwd=folder, stdout=-1, errors='replace').stdout
    return re.findall(r'^(?:FAILED|ERROR) (tests/[^[\s]+)', output, re.M)


os.chdir(Path(__file__).parent.parent)
end, survived = [*sys.argv, '--'].index('--') + 1, 0
parts = [re.split(r' \| | => ', line) for line in FAULTS]
if wrong := [old for file, _, old, _ in parts if Path(file).read_text().count(old) != 1] or failing(
    'model.py'
):
    sys.exit(f'no longer there once, or failing without a fault: {wrong}')
for number in [*map(int, sys.argv[1 : end - 1])] or range(1, 41):
    start, (file, fault, *edit) = monotonic(), parts[number - 1]
    tests = failing(file, *edit) or ['**survives**']
    survived += tests == ['**survives**']
    print(number, file, fault, tests[0], f'{monotonic() - start:.0f} s', sep=' | ', flush=True)
sys.exit(survived and f'{survived} survive')
