"""The contact sheet of a data set, which cannot be committed by accident."""

import re
import subprocess

import pytest
from conftest import ROOT

import data_manager
from page import sheet
from readers.folder import Folder
from readers.tree import Dataset
from runtime.errors import UserError


def test_persons_are_rows_and_cameras_columns(data_dir, tmp_path):
    dataset = data_manager.init_dataset('market1501', str(data_dir))
    html = sheet.write(dataset, tmp_path / 'sheet.html').read_text()
    persons = {pid for _, pid, _ in dataset.query + dataset.gallery} - {0} | set(dataset.train_pids)
    cameras = {camid for _, _, camid in dataset.train + dataset.query + dataset.gallery}
    assert html.count('<tr><th scope="row">') == len(persons) == 11
    number = sum(pid == 0 for _, pid, _ in dataset.gallery)
    assert f'images or tracklets there. {number} images of distractors are not shown.</p>' in html and number
    assert [int(number) - 1 for number in re.findall(r'<th scope="col">camera (\d+)', html)] == sorted(cameras)
    pairs = {(pid, camid) for _, pid, camid in dataset.query + dataset.gallery if pid}
    pairs |= {(dataset.train_pids[label], camid) for _, label, camid in dataset.train}
    assert html.count('<img src="data:image/jpeg;base64,') == len(pairs)
    assert '<p class="notice">This is a page of pictures of people: do not publish it.</p>' in html
    assert 'src="http' not in html and '--page: light-dark(' in html  # one file, in the look of the other pages


def test_videos_and_pictures_that_are_missing(data_dir, tmp_path):
    dataset = data_manager.init_dataset('mars', str(data_dir))
    dataset.query = [(('none.jpg',), 77, 0)]
    html = sheet.write(dataset, tmp_path / 'mars_sheet.html').read_text()
    assert html.count('no picture') == 1 and '<th scope="row">77<br>' in html


def test_names_are_escaped_and_unknown_cameras_are_one_column(tmp_path):
    for person in ('<b>x', 'y'):
        (tmp_path / 'p' / person).mkdir(parents=True)
        (tmp_path / 'p' / person / '1.jpg').touch()
    html = sheet.write(Folder(str(tmp_path / 'p')), tmp_path / 'sheet.html').read_text()
    assert '&lt;b&gt;x' in html and '<b>x' not in html
    assert re.findall(r'<th scope="col">(.*?)</th>', html) == ['camera unknown']


@pytest.mark.parametrize(
    ('dataset', 'names'),
    [
        (Dataset('own', [('a.jpg', 1, 0), ('a.jpg', 2, 3)], [], []), ['0', '3']),
        (Dataset('own', [('a.jpg', 1, 0), ('a.jpg', 2, 1)], [], [], cameras=[4, 70]), ['4', '70']),
        (Dataset('own', [('a.jpg', 1, 0), ('a.jpg', 2, 1)], [], [], camera_names={0: 'door', 1: '02'}), ['door', '02']),
    ],
)
def test_cameras_have_the_names_of_the_data(dataset, names, tmp_path):
    html = sheet.write(dataset, tmp_path / 'sheet.html').read_text()
    assert re.findall(r'<th scope="col">camera (.*?)</th>', html) == names


@pytest.mark.parametrize('table', ['path,pid,camid,split', 'path,pid,camid,split,tracklet'])
def test_who_is_numbered_0_is_a_person_if_a_query_has_it(table, tmp_path):
    more = ',1' if 'tracklet' in table else ''
    rows = [f'a.jpg,0001,1,train{more}', f'b.jpg,0002,2,train{more}', f'c.jpg,0000,1,gallery{more}']
    path = tmp_path / 'table.csv'
    for query, persons, left_out in (('0003', ['0001', '0002', '0003'], 1), ('0000', ['0000', '0001', '0002'], 0)):
        path.write_text('\n'.join([table, *rows, f'd.jpg,{query},2,query{more}']) + '\n')
        html = sheet.write(data_manager.init_dataset(f'csv:{path}'), tmp_path / 'sheet.html').read_text()
        assert re.findall(r'<th scope="row">(\w+)<br>', html) == persons
        assert ('of distractors are not shown' in html) == bool(left_out)


def test_large_data_sets_show_some(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, 'PERSONS', 3)
    html = sheet.write(data_manager.init_dataset('market1501', str(data_dir)), tmp_path / 'sheet.html').read_text()
    assert '<p>3 of 11 persons; the first picture' in html and html.count('<tr><th scope="row">') == 3
    monkeypatch.setattr(sheet, 'CAMERAS', 2)
    html = sheet.write(data_manager.init_dataset('market1501', str(data_dir)), tmp_path / 'sheet.html').read_text()
    cameras = re.findall(r'<p>3 of 11 persons in the first 2 of (\d) cameras; the first picture', html)
    assert int(cameras[0]) > html.count('<th scope="col">camera ') == 2


def test_git_ignores_the_name_that_is_asked_for(data_dir, tmp_path, monkeypatch, capsys):
    dataset = data_manager.init_dataset('market1501', str(data_dir))
    with pytest.raises(
        UserError, match=r'--sheet people.html: the name must end in sheet.html, which git ignores: it is a'
    ):
        sheet.write(dataset, 'people.html')
    ignored = ['sheet.html', 'docs/market sheet.html']
    found = subprocess.run(['git', 'check-ignore', *ignored], cwd=ROOT, capture_output=True, text=True)
    if found.returncode == 128:
        pytest.skip('no git here')
    assert found.stdout.replace('"', '').splitlines() == ignored
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['data_manager.py', '--data-dir', str(data_dir), '--sheet', 'sheet.html'])
    assert data_manager.main() == 0
    assert 'Wrote sheet.html, a page of pictures of people: do not publish it\n' in capsys.readouterr().out
