"""Files and folders passed by mistake: each is recognised and reported in one line, with what to do."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_readers import put_info
from torch import nn

from batches import decoding
from files import unpickling
from files.kinds import HEAD, MODELS, not_a_file, recognised
from readers.mars import Mars
from runtime.errors import UserError

CHECKPOINT = {'base.0.weight': torch.ones(3)}


def saved(thing=CHECKPOINT, **how):
    buffer = io.BytesIO()
    torch.save(thing, buffer, **how)
    return buffer.getvalue()


def written(write):
    """The bytes of the file that `write(path)` writes."""

    def make(folder: Path) -> bytes:
        path = folder / 'made'
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of deprecated functions
            write(path)
        return path.read_bytes()

    return make


def tar(path):
    with tarfile.open(path, 'w') as archive:
        archive.addfile(tarfile.TarInfo('best.pth'), io.BytesIO())


def archive(*names, how=zipfile.ZIP_STORED):
    def write(path):
        with zipfile.ZipFile(path, 'w', how) as file:
            for name in names:
                file.writestr(name, bytes(99))

    return written(write)


def package(path):
    with torch.package.PackageExporter(str(path)) as file:
        file.save_pickle('model', 'weights.pkl', CHECKPOINT)


def exported(path):
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, path.with_suffix('.pt2'))
    path.with_suffix('.pt2').rename(path)


POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 94512345\n'
PAGE = b'\n<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title>'
GIVE = 'give the weights from which it was made; extract.py and search.py also take the ONNX files of export.py'
SAVE = 'save model.state_dict() with torch.save in the program that wrote it'
WEIGHTS = {  # bytes, or a function of a folder that makes them; the end of the message
    'git-lfs pointer': (POINTER, 'is a git-lfs pointer, not the file itself; run `git lfs pull` in its repository'),
    'web page': (PAGE, 'is an HTML page that was saved instead of the file; open its link in a browser, and download '
                 'the file itself'),
    'commented page': (b'<!-- saved from url -->\n<HTML lang="en">', 'is an HTML page that was saved'),
    'error of a bucket': (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', 'is an XML text, such as the'),
    'JSON': (b'{"architectures": ["ResNet"]}', 'is a JSON text; give the file that it describes'),
    'gzip': (gzip.compress(saved()), 'is compressed with gzip; unpack it with gunzip, or a .tar.gz with tar xzf'),
    'bzip2': (bz2.compress(saved()), 'is compressed with bzip2; unpack'),
    'xz': (lzma.compress(saved()), 'is compressed with xz; unpack'),
    'zstd': (b'\x28\xb5\x2f\xfd\x00', 'is compressed with zstd; unpack'),
    'tar': (written(tar), 'is a tar archive; unpack it with tar xf, and give the file in it'),
    '7z': (b'7z\xbc\xaf\x27\x1c\x00\x04', 'is a 7z archive; unpack it with 7z x'),
    'rar': (b'Rar!\x1a\x07\x01\x00', 'is a rar archive; unpack it with unrar x'),
    'zip': (archive('README.md', 'run/best.pth.tar'), 'is a zip file that contains run/best.pth.tar; unpack it with '
            'unzip, and give that file'),
    'deflated zip': (archive('__MACOSX/._a.pth', 'a.pth', how=zipfile.ZIP_DEFLATED), 'that contains a.pth; unpack'),
    'odd name in a zip': (archive('a\x1b[2J.pth'), r'that contains a\x1b[2J.pth; unpack'),
    'TorchScript': (written(lambda path: torch.jit.script(nn.Linear(2, 2)).save(str(path))),
                    f'is a TorchScript program, not weights; {SAVE}'),
    'traced': (written(lambda path: torch.jit.trace(nn.ReLU(), torch.ones(1)).save(str(path))), 'is a TorchScript pro'),
    'torch.export': (written(exported), f'is a program of torch.export (.pt2), not weights; {GIVE}'),
    'torch.package': (written(package), 'is a package of torch.package, not weights; '),
    'ONNX': (b'\x08\x08\x12\x07pytorch\x1a\x062.14.0:', f'is an ONNX model, not weights; {GIVE}'),
    'ONNX without a producer': (b'\x08\x0a:\xff\x07', 'is an ONNX model'),
    'Keras': (archive('metadata.json', 'config.json', 'model.weights.h5'), 'is a Keras model; give weights that Py'),
    'HDF5': (b'\x89HDF\r\n\x1a\n\x00', 'is an HDF5 file, such as Keras writes; give weights that PyTorch wrote'),
    'TensorFlow Lite': (b'\x1c\x00\x00\x00TFL3', 'is a TensorFlow Lite model'),
    'GGUF': (b'GGUF\x03\x00', 'is a GGUF model'),
    'npy': (written(lambda path: np.save(path.open('wb'), np.ones(3))), 'is a NumPy array; give'),
    'npz': (written(lambda path: np.savez(path.open('wb'), a=np.ones(3))), 'is a file of NumPy arrays (.npz); give'),
    'MATLAB': (b'MATLAB 5.0 MAT-file, Platform', 'is a .mat file of MATLAB'),
    'AppleDouble': (b'\x00\x05\x16\x07\x00\x02', 'is a metadata file of macOS (._NAME); give the file itself'),
    'pickle of Python 3': (pickle.dumps({'a': 1}, 4), 'PyTorch writes; save it again, with torch.save('),
    'empty': (b'', 'is empty; get the checkpoint again'),
    'text': (b'a text', "is not a PyTorch file (it begins with b'a te'); give a checkpoint or a state dict"),
}  # fmt: skip


@pytest.mark.parametrize('name', WEIGHTS)
def test_a_file_that_is_no_weights_is_named(name, tmp_path):
    content, message = WEIGHTS[name]
    (tmp_path / 'x.pth').write_bytes(content(tmp_path) if callable(content) else content)
    with pytest.raises(UserError) as refused:
        unpickling.load(tmp_path / 'x.pth')
    text = str(refused.value)
    assert text.startswith(f'{tmp_path}/x.pth ') and text.isprintable()
    assert message in text


@pytest.mark.parametrize('legacy', [False, True])
def test_weights_are_not_taken_for_anything_else(legacy, tmp_path):
    content = saved(_use_new_zipfile_serialization=not legacy)
    (tmp_path / 'x.pth').write_bytes(content)
    assert recognised(content[:HEAD], *MODELS) == ''
    assert unpickling.load(tmp_path / 'x.pth')[0].keys() == CHECKPOINT.keys()


def refused(path) -> str:
    with pytest.raises(UserError) as error:
        unpickling.load(path)
    return str(error.value).removeprefix(f'{path} ')


def test_a_folder_names_its_newest_checkpoint(tmp_path):
    run = tmp_path / 'run'
    run.mkdir()
    assert refused(run) == 'is a folder without checkpoints; give the path of a checkpoint'
    for age, name in enumerate(
        ('log.txt', 'best_model.pth.tar', 'resume_1_9.pth.tar', 'checkpoint_ep1.pth.tar', 'x.pth')
    ):
        (run / name).touch()
        os.utime(run / name, (1000 - age,) * 2)
    assert refused(run) == f'is a folder; the newest checkpoint in it is {run}/resume_1_9.pth.tar'
    for name in ('resume_1_9.pth.tar', 'checkpoint_ep1.pth.tar', 'x.pth'):
        (run / name).unlink()
    assert refused(run) == f'is a folder; the newest checkpoint in it is {run}/best_model.pth.tar'
    (run / 'archive').mkdir()
    (run / 'archive' / 'data.pkl').touch()
    for folder in (run, run / 'archive'):
        assert refused(folder).startswith(
            'is a folder into which a checkpoint was unpacked; give the checkpoint itself'
        )


# ---- the same in place of images, names and tables ----


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (POINTER, 'it is a git-lfs pointer, not the file itself; run'),
        (PAGE, 'it is an HTML page'),
        (b'\x00\x00\x00\x18ftypheic\x00', 'it is a HEIC or AVIF image; convert it to JPEG or PNG'),
        (b'\x00\x00\x00\x0cjP  \r\n\x87\n', 'it is a JPEG 2000 image'),
        (b'<?xml version="1.0"?>\n<svg width="4">', 'it is an SVG drawing'),
        (b'', 'it is not a JPEG, '),
        (saved(), 'it is not a JPEG, '),
    ],
)
def test_a_file_that_is_no_image_is_named(content, message, tmp_path):
    (tmp_path / 'x.jpg').write_bytes(content)
    with pytest.raises(UserError) as error:
        decoding.read_image(tmp_path / 'x.jpg')
    assert str(error.value).startswith(f'cannot read the image {tmp_path}/x.jpg: {message}')


@pytest.mark.parametrize('form', decoding.FORMATS)
def test_no_image_is_taken_for_anything_else(form, tmp_path):
    Image.new('RGB', (2, 3)).save(tmp_path / 'x', form)
    assert recognised((tmp_path / 'x').read_bytes()[:HEAD], *MODELS) == ''


@pytest.mark.parametrize('name', ['test_name.txt', 'query_IDX.mat'])
@pytest.mark.parametrize(
    ('content', 'what'),
    [(PAGE, 'is an HTML page'), (POINTER, 'is a git-lfs'), (gzip.compress(b'x'), 'is compressed')],
    ids=['page', 'pointer', 'gzip'],  # not the contents: gzip writes the time
)
def test_a_part_of_info_that_is_something_else(name, content, what, tmp_path):
    root = put_info(tmp_path / 'mars')
    (root / 'info' / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        Mars(tmp_path)
    assert str(error.value).startswith(f'{root}/info/{name} {what}')


def test_a_name_that_is_too_long_is_no_kind_of_file():
    assert not_a_file(300 * 'n') == ''
