"""Any data set as a CSV table: what is read, what is refused, and that a written table reads the same."""

import csv
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

import data_manager
import toy
from readers import table
from readers.market1501 import Market
from readers.mars import Mars
from readers.table import Table
from readers.tree import Dataset, natural, numbered
from runtime.errors import UserError

HEADER = 'path,pid,camid,split\n'
ROWS = 'a/1.jpg,Zoë,north,train\na/2.jpg,Zoë,south,train\nb.jpg,Bo 2,north,train\n'
ROWS += 'q.jpg,Bo 10,north,query\ng.jpg,Bo 10,south,gallery\n'


def put(folder, text, **how):
    path = folder / 'people.csv'
    path.write_text(text, **({'encoding': 'utf-8'} | how))
    return str(path)


def lists(dataset):
    return dataset.train, dataset.query, dataset.gallery


def by_name(dataset):
    """The same, with the persons' names instead of pids, and files without their folder."""
    return [
        [(os.path.basename(str(paths)), dataset.name_of(pid), camid) for paths, pid, camid in items]
        for items in ([(path, dataset.train_pids[label], camid) for path, label, camid in dataset.train],
                      dataset.query, dataset.gallery)
    ]  # fmt: skip


def refused(path):
    with pytest.raises(UserError) as error:
        Table(path)
    message = str(error.value)
    assert message.startswith(path) and '\n' not in message
    return message.removeprefix(path)


def test_any_text_names_a_person_and_a_camera(tmp_path, capsys):
    dataset = data_manager.init_dataset(f'csv:{put(tmp_path, HEADER + ROWS)}')
    assert dataset.kind == 'image'
    assert [dataset.name_of(pid) for pid in (1, 2, 3)] == ['Bo 2', 'Bo 10', 'Zoë']  # in natural order
    assert dataset.train == [(f'{tmp_path}/a/1.jpg', 1, 0), (f'{tmp_path}/a/2.jpg', 1, 1), (f'{tmp_path}/b.jpg', 0, 0)]
    assert (dataset.query, dataset.gallery) == ([(f'{tmp_path}/q.jpg', 2, 0)], [(f'{tmp_path}/g.jpg', 2, 1)])
    assert 'Cameras north, south are camids 0 to 1\n' in capsys.readouterr().out


def test_integers_are_used_as_they_are(tmp_path):
    """Distractors are 0, and junk, -1, is left out, as in Market1501."""
    rows = 'a.jpg,7,3,train\nb.jpg,100,5,train\nq.jpg,3,3,query\ng.jpg,0,5,gallery\nj.jpg,-1,5,gallery\n'
    dataset = Table(put(tmp_path, HEADER + rows))
    assert (dataset.train_pids, dataset.names) == ([7, 100], {})
    assert [item[1:] for items in lists(dataset) for item in items] == [(0, 3), (1, 5), (3, 3), (0, 5)]
    words = Table(put(tmp_path, HEADER + rows + 'x.jpg,x,5,gallery\n'))
    assert {words.name_of(pid) for _, pid, _ in words.gallery} == {'-1', '0', 'x'}


def test_integers_may_be_padded(tmp_path, capsys):
    """They are still numbers, including junk and distractors, and are shown as written."""
    rows = 'a.jpg,0002,01,train\nb.jpg,0010,2,train\nq.jpg,0001,01,query\ng.jpg,0000,2,gallery\nj.jpg,-1,2,gallery\n'
    dataset = Table(put(tmp_path, HEADER + rows + 'k.jpg,0001,2,gallery\n'))
    assert 'camids' not in capsys.readouterr().out
    assert (dataset.train_pids, dataset.names) == ([2, 10], {0: '0000', 1: '0001', 2: '0002', 10: '0010'})
    assert [item[1:] for items in lists(dataset) for item in items] == [(0, 1), (1, 2), (1, 1), (0, 2), (1, 2)]
    assert dataset.camera_names == {1: '01'}
    table.write(dataset, str(tmp_path / 'again.csv'))
    assert by_name(Table(str(tmp_path / 'again.csv'))) == by_name(dataset)
    assert 'q.jpg,0001,01,query\n' in (tmp_path / 'again.csv').read_text()


def test_spaces_around_cells_and_integers_of_other_programs(tmp_path, capsys):
    """As spreadsheets leave them, and as pandas writes a column with an empty cell."""
    rows = 'a.jpg,7 ,3.0,train\nb.jpg,\t7,3,train\nc.jpg,8.0,3 ,train \nq.jpg,9,3,query\ng.jpg, 9,4.00,gallery\n'
    dataset = Table(put(tmp_path, HEADER + rows + 'd.jpg,0.0,4,gallery\nj.jpg,-1.0,4,gallery\n'))
    assert (dataset.train_pids, dataset.names) == ([7, 8], {})
    assert [item[1:] for items in lists(dataset) for item in items] == [(0, 3), (0, 3), (1, 3), (9, 3), (9, 4), (0, 4)]
    capsys.readouterr()
    path = put(tmp_path, HEADER + rows + 'j.jpg,-1,4,gallery\nx.jpg,7.5,4,gallery\n')
    assert '7' in Table(path).names.values()
    line = f"{path}: '-1' counts as a person, not as junk, because '7.5' is no integer\n"
    assert capsys.readouterr().out.startswith(line)


def test_a_name_that_a_table_would_change_is_refused(tmp_path):
    for name in ('Ann ', '1.0'):
        dataset = Dataset('x', [('a', 1, 0), ('b', 2, 0)], [], [], names={1: name, 2: 'b'})
        with pytest.raises(
            UserError, match=re.escape(f'the person {name!r} would be {name[:-1].strip(".")!r} in a table')
        ):
            table.write(dataset, str(tmp_path / 'x.csv'))
        assert not (tmp_path / 'x.csv').exists()


@pytest.mark.parametrize(
    ('rows', 'fault'),
    [
        ('a,1,0,train\nb,2,0,train\nc,001,0,query\n', "persons '001' and '1'"),
        ('a,0,0,train\nb,-0,0,train\n', "persons '0' and '-0'"),
        ('a,1,07,train\nb,2,7,train\n', "cameras '07' and '7'"),
    ],
)  # fmt: skip
def test_two_spellings_of_one_number(rows, fault, tmp_path):
    assert refused(put(tmp_path, HEADER + rows)) == f': {fault} have the same number; write them alike, or rename one'
    assert len(Table(put(tmp_path, HEADER + rows + 'x,x,x,train\n')).names) > 1  # among other texts they are two


@pytest.mark.parametrize('text', ['+1', '1.0', '１', '0-', '0--1', '1-0', '1\n', str(10**18), ''])
def test_other_spellings_are_text(text):
    numbers, names = numbered(['5', text], 1, 'persons')
    assert sorted(numbers.values()) == [1, 2] and set(names.values()) == {'5', text}


def test_integers_padded_with_zeros_are_numbers():
    texts = {'0000': 0, '0002': 2, '00-1': -1, '-0005': -5, '10': 10}
    numbers, names = numbered(texts, 1, 'persons')
    assert numbers == texts and names == {0: '0000', 2: '0002', -1: '00-1', -5: '-0005'}


def test_natural_order():
    names = ['b', 'a10', 'a2', 'a02', 'a', '10', '9', 'a' + '9' * 5000]
    assert sorted(names, key=natural) == ['9', '10', 'a', 'a02', 'a2', 'a10', 'a' + '9' * 5000, 'b']


@pytest.mark.parametrize('head', ['path,pid,split', 'path,pid,camid,split'])
def test_unknown_cameras(head, tmp_path, capsys):
    blank = ',' if 'camid' in head else ''
    rows = ''.join(f'{name}.jpg,{pid}{blank},{split}\n' for name, pid, split in
                   (('a', 1, 'train'), ('b', 2, 'train'), ('q', 3, 'query'), ('g', 3, 'gallery')))  # fmt: skip
    dataset = Table(put(tmp_path, f'{head}\n{rows}'))
    assert dataset.no_cameras and {camid for items in lists(dataset) for _, _, camid in items} == {0}
    line = 'The cameras are unknown: a test counts matches from any camera, as with --any-camera\n'
    assert capsys.readouterr().out.count(line) == 1


def test_tables_as_spreadsheets_write_them(tmp_path):
    expected = by_name(Table(put(tmp_path, HEADER + ROWS)))
    for text, how in (
        (HEADER + ROWS, {'encoding': 'utf-8-sig'}),
        (HEADER + ROWS, {'encoding': 'utf-16'}),
        ((HEADER + ROWS).replace('\n', '\r\n'), {'newline': ''}),
        ((HEADER + ROWS).replace(',', ';'), {}),
        ((HEADER + ROWS).replace(',', '\t'), {}),
        (HEADER + '\n' + ROWS.replace('\n', '\n\n'), {}),
        (' Path ,PID, camid,Split\n' + ROWS, {}),
        (HEADER + ROWS.rstrip('\n'), {}),
    ):
        assert by_name(Table(put(tmp_path, text, **how))) == expected
    columns = 'split,note,camid,pid,path\n' + ''.join(
        f'{split},"x, ""y""",{camid},{pid},{path}\n' for path, pid, camid, split in csv.reader(ROWS.splitlines())
    )
    assert by_name(Table(put(tmp_path, columns))) == expected


def test_names_that_no_encoding_has(tmp_path):
    """Spaces, commas, quotes, shell characters, line breaks, other scripts, and bytes that are not UTF-8."""
    names = ['a b,c.jpg', '"q".jpg', '$(x);`y`&|*?.jpg', 'li\nne.jpg', '写真.jpg', os.fsdecode(b'\xff\xfe.jpg')]
    for name in names:
        (tmp_path / name).touch()
    path = tmp_path / 'people.csv'
    with open(path, 'w', encoding='utf-8', errors='surrogateescape', newline='') as file:
        csv.writer(file).writerows([['path', 'pid', 'split'], *([name, name, 'train'] for name in names)])
    dataset = Table(str(path))
    assert all(os.path.exists(paths) for paths, _, _ in dataset.train)
    assert sorted(dataset.names.values(), key=names.index) == names
    assert len(data_manager.digests(dataset)) == len(names)


def test_absolute_paths_are_kept(tmp_path):
    dataset = Table(put(tmp_path, HEADER + '/x/a.jpg,1,0,train\n../b.jpg,2,0,train\n'))
    assert [path for path, _, _ in dataset.train] == ['/x/a.jpg', f'{tmp_path}/../b.jpg']


@pytest.mark.parametrize(
    ('text', 'fault'),
    [
        ('', ', line 1: there is no column path; the columns are path, pid, camid, split, tracklet, frame'),
        ('path,pid\n', ', line 1: there is no column split; the columns are'),
        ('path,pid,split,pid\n', ', line 1: there are two columns pid; remove one'),
        (HEADER + 'a.jpg,1,0,train\nb.jpg,1,train\n', ', line 3: 3 cells, but line 1 has 4; put texts'),
        (HEADER + 'a.jpg,1,0,train\n\n,1,0,train\n', ', line 4: column path is empty'),
        (HEADER + 'a.jpg,,0,train\n', ', line 2: column pid is empty'),
        (HEADER + 'a.jpg,1,0,valid\n', ", line 2: column split is 'valid', not train, query or gallery"),
        (HEADER + 'a.jpg,1,0,\n', ', line 2: column split is empty'),
        (HEADER + 'a.jpg,1,0,\x1b[2J\n', r", line 2: column split is '\x1b[2J', not train"),
        (HEADER + 'a.jpg,1,0,train\nb.jpg,1,,train\n', ', line 3: column camid is empty, but other lines have one'),
        (HEADER + 'a.jpg,1,,train\nb.jpg,1,4,train\n', ', line 2: column camid is empty, but other lines have one'),
        (HEADER + 'a\0.jpg,1,0,train\n', ', line 2: column path contains a NUL'),
        (HEADER + '"a.jpg,1,0,train\n', ', line 2: unexpected end of data; save the table as CSV again'),
        (HEADER + f'{"a" * 200000},1,0,train\n', ', line 2: field larger than field limit'),
        ('path,pid,camid,split,tracklet\na.jpg,1,0,train,\n', ', line 2: column tracklet is empty'),
        (
            'path,pid,camid,split,tracklet,frame\na.jpg,1,0,train,t,1\nc.jpg,1,0,train,t,2\nb.jpg,1,0,train,t,1\n',
            ", line 4: column frame is '1', as in line 2 of the same tracklet; correct it",
        ),
    ],
)  # fmt: skip
def test_a_mistake_names_line_and_column(text, fault, tmp_path):
    assert refused(put(tmp_path, text)).startswith(fault)


@pytest.mark.parametrize(
    ('content', 'fault'),
    [
        (b'PK\x03\x04 a sheet', ' is a spreadsheet or an archive; save the table as CSV (UTF-8)'),
        (b'\x1f\x8b', ' is compressed with gzip'),
        (b'<html>', ' is an HTML page'),
        (b'\xff\xfe\x00', ', line 1: '),
    ],
)
def test_files_of_other_kinds(content, fault, tmp_path):
    (tmp_path / 'people.csv').write_bytes(content)
    assert refused(str(tmp_path / 'people.csv')).startswith(fault)


def test_a_home_folder_that_the_shell_left_alone(tmp_path, monkeypatch):
    put(tmp_path, HEADER + ROWS)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert len(data_manager.init_dataset('csv:~/people.csv').train) == 3
    assert data_manager.kind_of('csv:~/people.csv') == 'image'


def test_files_that_are_not_there(tmp_path):
    assert refused(f'{tmp_path}/none.csv') == ' does not exist; give a CSV file'
    assert refused(str(tmp_path)) == ' is not a regular file; give a CSV file'
    os.mkfifo(tmp_path / 'pipe')
    assert refused(f'{tmp_path}/pipe') == ' is not a regular file; give a CSV file'


# ---- videos ----


def test_rows_of_one_tracklet_are_frames(tmp_path):
    """A tracklet is identified by split, pid, camid and tracklet, so its number may start again in each camera."""
    head = 'path,pid,camid,split,tracklet,frame\n'
    rows = (
        'f10,a,1,train,1,10\nf2,a,1,train,1,2\ng1,a,2,train,1,1\nh1,b,1,train,1,1\nf1,a,1,train,1,1\nq,c,1,query,7,1\n'
    )
    path = put(tmp_path, head + rows)
    dataset = Table(path)
    assert (dataset.kind, table.kind_of(path)) == ('video', 'video')
    names = [([os.path.basename(path) for path in paths], pid, camid) for paths, pid, camid in dataset.train]
    assert names == [(['f1', 'f2', 'f10'], 0, 1), (['g1'], 0, 2), (['h1'], 1, 1)]
    unsorted = Table(put(tmp_path, (head + rows).replace(',frame', ',other')))
    assert [os.path.basename(path) for path in unsorted.train[0][0]] == ['f10', 'f2', 'f1']  # as the rows are


def test_a_script_for_the_other_kind_is_named_before_anything_starts(tmp_path, script, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, 'path,pid,split,tracklet\n')
    assert script('train_img_model_xent', '-d', 'csv:people.csv') == 2
    assert (
        '-d csv:people.csv contains tracklets, but train_img_model_xent.py trains on images' in capsys.readouterr().err
    )
    assert script('train_img_model_xent', '-d', 'csv:none.csv') == 2
    assert capsys.readouterr().err == 'error: -d csv:none.csv: none.csv does not exist; give a CSV file\n'
    assert not (tmp_path / 'log').exists()


# ---- written and read again ----


@pytest.mark.parametrize('name', ['market1501', 'mars', 'mars_official'])
def test_a_table_reads_as_the_data_set_that_was_written(name, data_dir, tmp_path):
    """The same items in the same order, labels and pids, and so everything that is computed from them."""
    dataset = data_manager.init_dataset(name, str(data_dir))
    written = tmp_path / 'sub' / 'table.csv'
    rows = table.write(dataset, str(written))
    again = data_manager.init_dataset(f'csv:{written}')
    assert (again.kind, again.train_pids) == (dataset.kind, dataset.train_pids)
    for one, other in zip(lists(again), lists(dataset), strict=True):
        assert [item[1:] for item in one] == [item[1:] for item in other]
        for (mine, *_), (theirs, *_) in zip(one, other, strict=True):
            mine, theirs = ((paths,) if isinstance(paths, str) else paths for paths in (mine, theirs))
            assert len(mine) == len(theirs) and all(map(os.path.samefile, mine, theirs))
    assert data_manager.fingerprint(again) == data_manager.fingerprint(dataset)
    assert data_manager.digests(again) == data_manager.digests(dataset)
    assert rows == len(written.read_text().splitlines()) - 1
    assert not written.read_text().splitlines()[1].startswith('/')  # relative to the table


def test_a_table_is_read_through_a_link_to_its_folder(data_dir, tmp_path, monkeypatch):
    """The parent of a linked folder is that of its target. Images below the folder are named relative to it."""
    (tmp_path / 'elsewhere' / 'deep' / 'tables').mkdir(parents=True)
    (tmp_path / 'work').mkdir()
    (tmp_path / 'work' / 'data').symlink_to(data_dir)
    (tmp_path / 'work' / 'tables').symlink_to(tmp_path / 'elsewhere' / 'deep' / 'tables')
    monkeypatch.chdir(tmp_path / 'work')
    dataset = data_manager.init_dataset('market1501', 'data')
    table.write(dataset, 'tables/m.csv')
    again = data_manager.init_dataset('csv:tables/m.csv')
    assert all(os.path.samefile(mine[0], theirs[0]) for mine, theirs in zip(again.query, dataset.query, strict=True))
    inside = shutil.copytree(data_dir / 'market1501', tmp_path / 'work' / 'tables' / 'market1501')
    table.write(data_manager.init_dataset('market1501', str(inside.parent)), 'tables/inside.csv')
    assert {row.split('/')[0] for row in Path('tables/inside.csv').read_text().splitlines()[1:]} == {'market1501'}


def test_names_and_cameras_survive_a_table(tmp_path):
    dataset = Table(put(tmp_path, HEADER + ROWS))
    table.write(dataset, str(tmp_path / 'again.csv'))
    again = Table(str(tmp_path / 'again.csv'))
    assert by_name(again) == by_name(dataset)
    assert again.camera_names == dataset.camera_names == {0: 'north', 1: 'south'}
    unknown = Table(put(tmp_path, (HEADER + ROWS).replace('north', '').replace('south', '')))
    table.write(unknown, str(tmp_path / 'unknown.csv'))
    assert Table(str(tmp_path / 'unknown.csv')).no_cameras


def test_nothing_is_overwritten(tmp_path):
    dataset = Table(path := put(tmp_path, HEADER + ROWS))
    with pytest.raises(UserError, match=r'people.csv exists already; remove it, or give another name'):
        table.write(dataset, path)
    with pytest.raises(UserError, match=r'cannot be written .*; choose another folder'):
        table.write(dataset, f'{path}/sub/x.csv')
    assert (tmp_path / 'people.csv').read_text(encoding='utf-8') == HEADER + ROWS


def test_market_and_its_own_name_are_the_same(data_dir):
    published = data_manager.init_dataset('market1501', str(data_dir))
    own = data_manager.init_dataset(f'market:{data_dir}/market1501')
    assert lists(own) == lists(published) and isinstance(own, Market)
    assert own.multi_query() == published.multi_query()


def test_videos_of_any_text(data_dir, tmp_path):
    dataset = Mars(data_dir)
    dataset.names = {pid: f'person {pid}' for pid in range(-1, 100)}
    table.write(dataset, str(tmp_path / 'a.csv'))
    again = Table(str(tmp_path / 'a.csv'))
    assert len(again.train) == len(dataset.train) and again.name_of(again.query[0][1]).startswith('person ')


def test_a_long_table_is_read_in_time(tmp_path):
    """50,000 rows; docs/data.md has the figures of a million. The limit is far above what it takes."""
    rng = np.random.default_rng(0)
    rows = (
        f'a/{row}.jpg,p{rng.integers(1000)},{row % 9},{("train", "query", "gallery")[row % 3]}' for row in range(50000)
    )
    path = put(tmp_path, HEADER + '\n'.join(rows))
    started = time.process_time()
    assert len(Table(path).train) == 16667
    assert time.process_time() - started < 5


def test_toys_have_tables_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    toy.draw_msmt17('msmt17', num_train=2, num_test=2, num_images=4, height=24, width=12)
    monkeypatch.setattr('sys.argv', ['data_manager.py', '-d', 'msmt17', '--data-dir', '.', '--write-csv', 'm.csv'])
    assert data_manager.main() == 0
    assert 'Wrote m.csv: 14 rows\n' in capsys.readouterr().out
    assert len(Table('m.csv').query) == 4
