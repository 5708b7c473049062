"""Reading and refusing images; the workers that read them, and all the ways in which they end; and the cache."""

import errno
import gc
import multiprocessing.util
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import warnings
import zlib

import numpy as np
import pictures
import pytest
import torch
from conftest import ROOT
from PIL import Image

from batches import caching, decoding, workers
from batches.decoding import read_image
from batches.workers import Block, Task, Workers, collate
from runtime.errors import ProcessLost, UserError

CPU = torch.device('cpu')


# Reading


def test_rgb_is_read_as_it_is(tmp_path):
    pictures.noise(32, 16).save(tmp_path / 'a.png')
    assert (np.asarray(read_image(tmp_path / 'a.png')) == np.asarray(pictures.noise(32, 16))).all()
    pictures.noise(32, 16).save(tmp_path / 'a.jpg')
    with Image.open(tmp_path / 'a.jpg') as image:
        assert (np.asarray(read_image(tmp_path / 'a.jpg')) == np.asarray(image)).all()


@pytest.mark.parametrize(
    ('mode', 'name', 'tolerance'),
    [
        ('L', 'a.jpg', 8),
        ('CMYK', 'a.jpg', 8),
        ('P', 'a.png', 40),
        ('RGBA', 'a.png', 0),
        ('1', 'a.png', 0),
        ('LA', 'a.png', 0),
    ],
)
def test_other_kinds_of_pixels_become_rgb(mode, name, tolerance, tmp_path):
    original = pictures.noise(32, 16).convert(mode)
    original.save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == 'RGB' and image.size == (16, 32)
    difference = np.asarray(image).astype(int) - np.asarray(original.convert('RGB'))
    assert np.abs(difference).max() <= tolerance


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    original = pictures.noise(32, 16).quantize(16)
    original.save(tmp_path / 'a.png', transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        pixels = np.asarray(read_image(tmp_path / 'a.png'))
    assert (pixels == np.asarray(original.convert('RGB'))).all()


@pytest.mark.parametrize('name', ['a.png', 'a.tif'])
def test_of_16_bits_the_upper_8_are_kept(name, tmp_path):
    grey = np.linspace(0, 65535, 32 * 16).astype(np.uint16).reshape(32, 16)
    Image.fromarray(grey).save(tmp_path / name)
    assert (np.asarray(read_image(tmp_path / name)) == (grey >> 8)[..., None]).all()


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    first, second = (Image.new('RGB', (16, 32), color) for color in ('red', 'blue'))
    first.save(tmp_path / 'a.gif', save_all=True, append_images=[second])
    assert (np.asarray(read_image(tmp_path / 'a.gif')) == [255, 0, 0]).all()


def test_a_rotation_in_exif_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees
    pictures.noise(32, 16).save(tmp_path / 'a.jpg', exif=exif)
    assert read_image(tmp_path / 'a.jpg').size == (16, 32)


def png_that_declares(width: int, height: int) -> bytes:
    """A PNG of a few bytes, one chunk of which says how large the image is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(99))) + chunk(b'IEND', b'')
    )


def make_program(path, tmp_path):
    path.write_text(f'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({tmp_path}/ran) (w) file closefile showpage\n')


BAD = {
    'missing': (lambda path, _: None, 'No such file'),
    'empty': (lambda path, _: path.write_bytes(b''), 'it is not a JPEG, PNG'),
    'text': (lambda path, _: path.write_text('not an image\n'), 'it is not a JPEG, PNG'),
    'program': (make_program, 'it is not a JPEG, PNG'),
    'folder': (lambda path, _: path.mkdir(), 'directory'),
    'link': (lambda path, tmp_path: path.symlink_to(tmp_path / 'gone'), 'No such file'),
    'pipe': (lambda path, _: os.mkfifo(path), 'it is a pipe'),
    'cut': (lambda path, _: pictures.cut(path), 'truncated'),
    'bomb': (lambda path, _: path.write_bytes(png_that_declares(10**4, 10**4)), '10000 x 10000 pixels'),
    'large bomb': (lambda path, _: path.write_bytes(png_that_declares(10**5, 10**5)), 'decompression bomb'),
    'float': (lambda path, _: Image.fromarray(np.ones((4, 4), np.float32)).save(path, 'TIFF'), 'floating-point'),
    'depth': (
        lambda path, _: Image.fromarray(np.full((4, 4), 1 << 20, np.int32)).save(path, 'TIFF'),
        'more than 16 bits',
    ),
}


@pytest.mark.parametrize('kind', BAD)
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_what_is_no_image_is_refused_in_one_line_with_its_path(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, 'PAUSE', 0)
    path = tmp_path / f'{kind}.jpg'
    make, reason = BAD[kind]
    make(path, tmp_path)
    with pytest.raises(UserError) as error:
        read_image(path)
    message = str(error.value)
    assert message.startswith(f'cannot read the image {path}: ')
    assert reason in message and '\n' not in message and message.count(str(path)) == 1
    assert not (tmp_path / 'ran').exists()


def test_an_image_is_tried_three_times(tmp_path, monkeypatch):
    pictures.noise(32, 16).save(tmp_path / 'a.png')
    monkeypatch.setattr(decoding, 'PAUSE', 0)
    decode, tries = decoding.decode, []

    def fails(times):
        def attempt(path):
            tries.append(path)
            if len(tries) <= times:
                raise OSError(5, 'Input/output error', str(path))
            return decode(path)

        return attempt

    monkeypatch.setattr(decoding, 'decode', fails(2))
    assert read_image(tmp_path / 'a.png').size == (16, 32)
    assert len(tries) == 3
    tries.clear()
    monkeypatch.setattr(decoding, 'decode', fails(3))
    with pytest.raises(UserError, match=r'a\.png: Input/output error$'):
        read_image(tmp_path / 'a.png')
    assert len(tries) == 3


# What a data set may return


def test_a_block_holds_images_by_size_in_one_run_of_bytes(mixed):
    """What --cache ram sends to a GPU is what workers send to the run."""
    images = [read_image(path) for path, _, _ in mixed[:7]]
    block = collate([(image, index, 0, str(index)) for index, image in enumerate(images)])
    assert block.pixels.dim() == 1 and block.pixels.dtype == torch.uint8 and len(block.groups) == 3
    assert block.pids == list(range(7)) and block.counts == [1] * 7 and block.more == [(str(k),) for k in range(7)]
    for arrived, expected in zip(pictures.in_order(block.images(CPU)), images, strict=True):
        assert (arrived.numpy() == np.asarray(expected)).all()


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)  # (H, W, 3)


@pytest.mark.parametrize(
    'image',
    [
        Image.fromarray(PIXELS),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        torch.from_numpy(PIXELS).permute(2, 0, 1).contiguous(),
        PIXELS.transpose(2, 0, 1),
    ],
    ids=['PIL', 'tensor of a decoder', 'contiguous tensor', 'array'],
)
def test_images_of_8_bits_arrive_as_they_are(image):
    block = collate([(image, 0, 0)] * 2)
    assert block.pixels.dtype == torch.uint8 and block.pixels.tolist() == PIXELS.ravel().tolist() * 2


def test_a_grey_pil_image_becomes_rgb():
    assert collate([(Image.new('L', (4, 6), 7), 0, 0)]).pixels.tolist() == [7] * 72


@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_prepared_images_become_float32(kind):
    image = torch.arange(24.0).view(3, 4, 2).to(kind)
    block = collate([(image.requires_grad_(), 0, 0)])
    assert block.pixels.dtype == torch.float32
    assert torch.equal(block.images(CPU)[0][1][0], image.detach().float().permute(1, 2, 0))


@pytest.mark.parametrize(
    ('images', 'what'),
    [
        ([torch.zeros(4, 2, 3, dtype=torch.uint8)], 'it returned uint8 (4, 2, 3)'),  # height, width, channels
        ([torch.zeros(4, 2, dtype=torch.uint8)], 'it returned uint8 (4, 2)'),
        ([torch.zeros(1, 4, 2)], 'it returned float32 (1, 4, 2)'),
        ([torch.zeros(3, 4, 2, dtype=torch.int64)], 'it returned int64 (3, 4, 2)'),
        ([torch.zeros(3, 4, 2), torch.zeros(3, 4, 3)], 'it returned float32 (3, 4, 2), float32 (3, 4, 3)'),
        (
            [torch.zeros(3, 4, 2), torch.zeros(3, 4, 2, dtype=torch.uint8)],
            'it returned float32 (3, 4, 2), uint8 (3, 4, 2)',
        ),
    ],
)
def test_images_that_would_be_misread_are_refused_in_one_line(images, what):
    with pytest.raises(UserError) as error:
        collate([(image, 0, 0) for image in images])
    assert str(error.value).startswith('a data set must return ') and str(error.value).endswith(what)


# Workers


def work(task: Task) -> Block:
    """A block whose pixels show which items it contains."""
    return collate([(torch.full((3, 4, 2), item % 256, dtype=torch.uint8), item, 0) for item in task.items])


def tasks_of(number: int, size: int = 2) -> list[Task]:
    items = [list(range(at * size, at * size + size)) for at in range(number)]
    return [Task(each, each) for each in items]


def pids_of(blocks) -> list[list[int]]:
    return [block.pids for block in blocks]


@pytest.fixture
def decoders():
    """Create workers, which end with the test."""
    made = []

    def make(number: int, work=work) -> Workers:
        made.append(Workers(number, work, pin=False))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize('number', [0, 1, 2, 3])
@pytest.mark.parametrize('count', [0, 1, 2, 7])
def test_blocks_come_in_the_order_of_their_tasks(number, count, decoders):
    some, tasks = decoders(number), tasks_of(count)
    for _ in range(2):
        blocks = list(some.blocks(iter(tasks)))
        assert pids_of(blocks) == [task.items for task in tasks]
        for block in blocks:
            assert block.pixels.tolist() == [item % 256 for item in block.pids for _ in range(24)]
    assert len(some.workers) == min(number, count)
    some.close()
    assert some.workers == []


def test_as_many_blocks_are_made_ahead_as_there_are_workers(decoders):
    asked = []

    def tasks():
        for task in tasks_of(6):
            asked.append(task)
            yield task

    blocks = decoders(3).blocks(tasks())
    for done in range(1, 4):
        next(blocks)
        assert len(asked) == done + 3


@pytest.mark.parametrize('number', [0, 2])
def test_an_iteration_can_be_left_for_another(number, decoders):
    some, tasks = decoders(number), tasks_of(6)
    left = some.blocks(tasks)
    assert next(left).pids == [0, 1]
    assert pids_of(some.blocks(tasks[3:])) == [task.items for task in tasks[3:]]
    blocks = some.blocks(tasks)
    assert next(blocks).pids == [0, 1]
    left.close()
    assert next(blocks).pids == [2, 3]
    blocks.close()
    assert pids_of(some.blocks(tasks)) == [task.items for task in tasks]


def test_an_iteration_that_was_left_does_not_continue_with_blocks_of_another(decoders):
    some, tasks = decoders(2), tasks_of(6)
    left = some.blocks(tasks)
    next(left)
    blocks = some.blocks(tasks)
    next(blocks)
    with pytest.raises(RuntimeError, match='a later iteration has taken over the workers'):
        next(left)
    assert pids_of(blocks) == [task.items for task in tasks[1:]]


def test_blocks_and_tasks_that_no_pipe_holds(decoders):
    """A worker waits in sending a block, while the run may wait in sending a task to it or to another one."""

    def enlarge(task):
        return collate([(torch.zeros(3, 1000, 700, dtype=torch.uint8), sum(task.items), 0, 'x' * 3_000_000)])

    tasks = tasks_of(8, size=100_000)  # pickled, half a megabyte
    blocks = list(decoders(2, enlarge).blocks(tasks))
    assert pids_of(blocks) == [[sum(task.items)] for task in tasks]
    assert all(len(block.pixels) == 2_100_000 and len(block.more[0][0]) == 3_000_000 for block in blocks)


def test_whatever_else_a_data_set_returns_arrives_without_shared_memory(decoders):
    """Files in /dev/shm, which multiprocessing would send tensors through, are refused to the worker."""
    more = (
        torch.arange(6.0).view(2, 3), torch.ones(2).bfloat16(), np.arange(3), 'name', None, 3.5,
        {'pose': [torch.zeros(2, dtype=torch.int16), (1, 2)]}, torch.ones(0, 4), torch.arange(6).view(2, 3).T,
    )  # fmt: skip

    def refused(task):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        return collate([(torch.zeros(3, 2, 2), 0, 0, *more)])

    (block,) = decoders(1, refused).blocks(tasks_of(1))
    (arrived,) = block.more
    assert all(torch.equal(arrived[k], more[k]) and arrived[k].dtype == more[k].dtype for k in (0, 1, 7, 8))
    assert (arrived[2] == more[2]).all() and arrived[3:6] == more[3:6]
    assert torch.equal(arrived[6]['pose'][0], more[6]['pose'][0]) and arrived[6]['pose'][1] == (1, 2)


class Unsendable(Exception):
    def __init__(self):
        super().__init__(threading.Lock())


@pytest.mark.parametrize(
    'problem',
    [ValueError('wrong'), Unsendable(), OSError(5, 'Input/output error'), EOFError(), MemoryError(), StopIteration(),
     SystemExit(3), KeyboardInterrupt(), GeneratorExit()],
    ids=lambda problem: type(problem).__name__,
)  # fmt: skip
@pytest.mark.parametrize('number', [0, 2])
def test_whatever_a_data_set_raises_ends_the_iteration(number, problem, decoders):
    def fails(task):
        if task.items == [4, 5]:
            raise problem
        return work(task)

    some = decoders(number, fails)
    blocks = some.blocks(tasks_of(6))
    assert [next(blocks).pids, next(blocks).pids] == [[0, 1], [2, 3]]
    kind = RuntimeError if number or isinstance(problem, StopIteration) else type(problem)
    out_of_memory = number and isinstance(problem, MemoryError)
    with pytest.raises(UserError if out_of_memory else kind) as error:
        next(blocks)
    if out_of_memory:
        assert re.fullmatch('memory ran out in a process that decodes images .*; use fewer --workers', str(error.value))
    elif number:
        assert str(error.value).startswith('in a process that decodes images:\nTraceback')
        assert type(problem).__name__ in str(error.value) and 'in fails' in str(error.value)
    assert some.workers == [] and next(blocks, None) is None
    assert pids_of(some.blocks(tasks_of(2))) == [[0, 1], [2, 3]]


@pytest.mark.parametrize('number', [0, 2])
def test_a_mistake_of_the_user_arrives_as_one(number, decoders):
    def mistaken(task):
        raise UserError('cannot read the image 13.jpg: it is missing')

    with pytest.raises(UserError, match=r'^cannot read the image 13\.jpg: it is missing$'):
        list(decoders(number, mistaken).blocks(tasks_of(6)))


def test_what_cannot_be_sent_is_an_error_and_no_lost_worker(decoders):
    def unsendable(task):
        return collate([(torch.zeros(3, 2, 2), 0, 0, threading.Lock())])

    with pytest.raises(RuntimeError, match=r"cannot pickle '_thread\.lock' object"):
        list(decoders(2, unsendable).blocks(tasks_of(6)))


@pytest.mark.parametrize(
    ('end', 'message'),
    [
        (signal.SIGKILL, 'was killed by SIGKILL, probably because memory ran out: use fewer --workers'),
        (signal.SIGALRM, 'was killed by SIGALRM: with --workers 0 the run decodes images itself'),
        (signal.SIGRTMIN + 3, 'was killed by signal 37: with --workers 0 the run decodes images itself'),
        (None, 'ended with status 5: with --workers 0 the run decodes images itself'),
    ],
)
def test_a_lost_worker_is_reported_by_how_it_ended(end, message, decoders):
    def dies(task):
        if task.items[0] > 3:
            os.kill(os.getpid(), end) if end else os._exit(5)
        return work(task)

    some = decoders(2, dies)
    blocks = some.blocks(tasks_of(4))
    assert [next(blocks).pids, next(blocks).pids] == [[0, 1], [2, 3]]
    with pytest.raises(ProcessLost, match=f'^a process that decodes images {re.escape(message)}$'):
        next(blocks)
    assert some.workers == []
    assert pids_of(some.blocks(tasks_of(2))) == [[0, 1], [2, 3]]


def test_a_worker_that_is_lost_in_the_middle_of_sending(decoders, monkeypatch):
    """The run has read the first bytes of a block, which is larger than any pipe."""
    lost = decoders(1, lambda task: collate([(torch.zeros(3, 2048, 1024, dtype=torch.uint8), 0, 0)]))

    def read(file, room, whole=workers._read):
        whole(file, room[:1000])
        lost.workers[0].process.kill()
        whole(file, room[1000:])

    monkeypatch.setattr(workers, '_read', read)
    with pytest.raises(ProcessLost, match='SIGKILL'):
        next(lost.blocks(tasks_of(1)))


def test_a_worker_that_is_lost_between_two_epochs(decoders):
    some = decoders(2)
    list(some.blocks(tasks_of(4)))
    some.workers[1].process.kill()
    some.workers[1].process.join()
    with pytest.raises(ProcessLost, match='SIGKILL'):
        list(some.blocks(tasks_of(4)))


def test_workers_that_cannot_be_started(decoders, monkeypatch):
    """Starting the third process fails, as if there were too many; the others end."""
    start, before = multiprocessing.process.BaseProcess.start, len(multiprocessing.active_children())

    def refuse(process):
        if len(multiprocessing.active_children()) == before + 2:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        start(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, 'start', refuse)
    message = r'^3 processes that decode images cannot be started \(Resource .*\): use fewer --workers, or 0$'
    with pytest.raises(UserError, match=message):
        list(decoders(3).blocks(tasks_of(4)))
    assert len(multiprocessing.active_children()) == before


class Stop(BaseException):
    """What a signal raises in a run, at any place."""


def test_a_signal_that_ends_the_run_while_it_waits_for_a_block(decoders):
    def stop(number, frame):
        raise Stop

    run = os.getpid()

    def work_and_signal(task):
        if task.items == [4, 5]:
            os.kill(run, signal.SIGUSR1)
            signal.pause()
        return work(task)

    some = decoders(2, work_and_signal)
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        blocks = some.blocks(tasks_of(6))
        with pytest.raises(Stop):
            list(blocks)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert some.workers == []


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_a_worker_that_is_just_born_is_ignored(number, decoders):
    """It would still raise there what it raises in the run."""

    def stop(number, frame):
        raise Stop

    class Mark:
        pass

    mark, before = Mark(), signal.signal(number, stop)
    multiprocessing.util.register_after_fork(mark, lambda _: os.kill(os.getpid(), number))
    try:
        assert pids_of(decoders(2).blocks(tasks_of(4))) == [task.items for task in tasks_of(4)]
    finally:
        signal.signal(number, before)


def test_a_worker_takes_one_thread_and_leaves_signals_to_processes_that_it_starts(decoders):
    def look(task):
        pids = [torch.get_num_threads(), len(signal.pthread_sigmask(signal.SIG_BLOCK, []))]
        return collate([(torch.zeros(3, 2, 2), pid, 0) for pid in pids])

    assert pids_of(decoders(1, look).blocks(tasks_of(1))) == [[1, 0]]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])  # nor does the run keep them blocked


def test_what_is_the_runs_is_not_freed_in_a_worker(decoders):
    """A cycle that is garbage already, whose finalizer would delete a folder of the run, or memory of a GPU."""
    freed, end = os.pipe()

    class Folder:
        def __init__(self):
            self.itself = self

        def __del__(self):
            os.write(end, f'{os.getpid()} '.encode())

    def collect(task):
        gc.collect()
        return work(task)

    some = decoders(2, collect)
    gc.disable()
    try:
        Folder()
        list(some.blocks(tasks_of(4)))
    finally:
        gc.enable()
    some.close()
    gc.collect()
    os.close(end)
    with open(freed) as file:
        assert file.read() == f'{os.getpid()} '


def test_open_files_and_processes_stay_as_they_are(decoders):
    def look():
        return len(os.listdir('/proc/self/fd')), len(multiprocessing.active_children())

    some = decoders(2)
    list(some.blocks(tasks_of(4)))
    before = look()
    for turn in range(100):
        list(some.blocks(tasks_of(4)))
        if turn % 10 == 0:
            next(some.blocks(tasks_of(4)))  # left in the middle
            other = Workers(2, work, pin=False)
            list(other.blocks(tasks_of(4)))
            del other
    assert look() == before


ORPHANED = """
import os, signal, sys, torch
from batches.workers import Task, Workers, collate

def work(task):
    return collate([(torch.zeros(3, 2000, 1000, dtype=torch.uint8), task.items[0], 0)])

def begun():
    blocks = Workers(2, work, pin=False).blocks(Task([at], [at]) for at in range(9))
    next(blocks)
    return blocks

one = begun()  # its workers wait until somebody reads their blocks
two = begun()
three = Workers(2, work, pin=False)
list(three.blocks([Task([0], [0]), Task([1], [1])]))  # these wait for tasks
print('begun', flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def python(program: str, *args: str) -> subprocess.CompletedProcess:
    """Returns when the program and all processes that it has started have ended, which hold its pipes open."""
    return subprocess.run(
        [sys.executable, '-c', program, *args],
        cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=600,
        start_new_session=True,
    )  # fmt: skip


def test_no_worker_outlives_a_run_that_was_killed():
    done = python(ORPHANED)
    assert (done.stdout, done.returncode) == ('begun\n', -signal.SIGKILL), done.stderr


SIGNALLED = """
import os, signal, sys, torch
from arguments import DataOptions
from dataset_loader import ImageDataset, TrainLoader
from runtime.device import Run
from samplers import RandomSampler

got = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, _: got.append(number))
items = [(path, index, 0) for index, path in enumerate(sys.argv[2:])]
options, run = DataOptions(workers=2), Run(torch.device('cpu'))
training = TrainLoader(ImageDataset(items), RandomSampler(items, 4), options, run)
batches = training.epoch(0)
next(batches)
os.killpg(0, signal.SIGTERM)
os.killpg(0, signal.SIGINT)
os.killpg(0, signal.SIGHUP)
assert len(list(batches)) == len(training) - 1 and len(list(training.epoch(1))) == len(training)
assert got == [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], got
print('continued', flush=True)
if sys.argv[1] == 'raises':
    batches = training.epoch(2)
    next(batches)
    raise RuntimeError('with workers at work')
"""


@pytest.mark.parametrize('end', ['returns', 'raises'])
def test_workers_ignore_signals_and_yet_end_with_the_run(end, images):
    done = python(SIGNALLED, end, *[path for path, _, _ in images])
    assert 'continued' in done.stdout, done.stderr
    assert done.returncode == (end == 'raises'), done.stderr


# Memory for the cache


def test_free_memory_is_that_of_this_machine():
    free = caching.free_memory(CPU)
    assert 1e6 < free <= os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


@pytest.mark.parametrize('limited', ['jobs', 'jobs/7', 'jobs/7/task'])
@pytest.mark.parametrize(
    ('groups', 'tree', 'limit', 'used', 'none'),
    [
        ('1:cpu:/x\n0::/jobs/7/task\n', '', 'memory.max', 'anon', 'max\n'),
        ('4:memory,hugetlb:/jobs/7/task\n', 'memory', 'memory.limit_in_bytes', 'total_rss', f'{2**63 - 4096}\n'),
    ],
)
def test_free_memory_respects_the_limits_of_containers_and_batch_jobs(
    limited, groups, tree, limit, used, none, tmp_path, monkeypatch
):
    """Of control groups of both versions, wherever the limit is set."""
    (tmp_path / 'groups').write_text(groups)
    (tmp_path / 'fs' / tree / 'jobs' / '7' / 'task').mkdir(parents=True)
    monkeypatch.setattr(caching, 'CGROUPS', tmp_path / 'fs')
    monkeypatch.setattr(caching, 'GROUPS_OF_PROCESS', tmp_path / 'groups')
    for name in ('jobs', 'jobs/7', 'jobs/7/task'):
        folder = tmp_path / 'fs' / tree / name
        (folder / limit).write_text('3000000\n' if name == limited else none)
        (folder / 'memory.stat').write_text(f'{used} 1000000\nfile 1900000\n')
    assert caching.free_memory(CPU) == 2_000_000
    (tmp_path / 'fs' / tree / limited / limit).write_text(none)
    assert caching.free_memory(CPU) > 2_000_000
    (tmp_path / 'groups').unlink()
    assert caching.free_memory(CPU) > 2_000_000
