"""Reads and writes any data set as a CSV table of files, persons, cameras and splits. `-d csv:FILE`"""

import codecs
import csv
import os
import re
from collections.abc import Iterator
from itertools import count, pairwise
from operator import itemgetter
from pathlib import Path
from typing import NoReturn, TextIO

from files.kinds import HEAD, Kind, recognised
from files.writing import write_whole
from readers.tree import JUNK, SPLITS, Dataset, Item, natural, numbered, paths_of, persons_of
from runtime.errors import UserError, plain

NEEDED_COLUMNS, VIDEO = ('path', 'pid', 'split'), ('tracklet', 'frame')
COLUMNS = ('path', 'pid', 'camid', 'split', *VIDEO)
DELIMITERS = ',;\t'  # as spreadsheets write them
AS_FLOAT = re.compile(r'-?[0-9]+\.0+')
WIDE = {codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}
SHEETS: list[Kind] = [
    (rb'PK\x03\x04|\xd0\xcf\x11\xe0', 'is a spreadsheet or an archive', 'save the table as CSV (UTF-8)')
]


Row = tuple[int, tuple[str, ...]]  # number of the line, and the cells of COLUMNS, '' if there is no such column
Subsets = dict[str, list]  # split -> items, whose pids and cameras are indices of their texts
Parsed = tuple[Subsets, list[str], list[str]]  # the subsets, the texts of the pids, and those of the cameras


class Table(Dataset):
    """The images or tracklets listed in a CSV file.

    The first line names the columns, in any order: path, pid, camid, split; for videos also tracklet, and frame if the
    rows are not in temporal order. Other columns are ignored. Paths are relative to the file. A split is train, query
    or gallery; not all of them need to be present.

    pids and camids are any text; spaces around them are ignored, and 1.0 is read as 1. If all pids are integers,
    possibly padded with zeros, these are the pids: 0 means distractors and -1 junk, which is left out, as in
    Market1501. Otherwise they are numbered from 1 in natural order, and `names` contains the texts. camids are treated
    in the same way, but numbered from 0. If all are empty, or the column is missing, the cameras are unknown.

    Each row is an item, in the order of the table. With a column tracklet, rows with equal split, pid, camid and
    tracklet are one item, in the place of its first row; its frames are sorted by `frame` in natural order.

    Raises UserError, with line and column, for a table that cannot be read, a missing column, a row of a different
    length, an empty cell, an unknown split, and a frame that occurs twice in a tracklet; also for two spellings of the
    same number.
    """

    def __init__(self, path: str, name: str = 'csv') -> None:
        with _opened(path) as file:
            header, others, rows = _rows(file, path)
            subsets, pids, cameras = (_videos if 'tracklet' in header else _images)(rows, path)
        pid_of, names = persons_of(pids, plain(path, 500))
        no_cameras = set(cameras) <= {''}
        camid_of, camera_names = {'': 0}, dict[int, str]()
        if not no_cameras:
            camid_of, camera_names = numbered(cameras, 0, f'{plain(path, 500)}: cameras')
        pid_at, camid_at = [pid_of[text] for text in pids], [camid_of[text] for text in cameras]
        lists: list[list[Item]] = []
        for split in SPLITS:
            items = subsets.pop(split)
            items[:] = [(paths, pid_at[pid], camid_at[camera]) for paths, pid, camera in items]
            lists.append([item for item in items if item[1] != JUNK])
        lengths = [len(item[0]) for items in lists for item in items] if 'tracklet' in header else []
        super().__init__(name, *lists, lengths=lengths, names=names, camera_names=camera_names, no_cameras=no_cameras)
        if others:
            print(f'Columns that are not read: {", ".join(plain(other, 40) for other in others[:8])}')


def kind_of(path: str) -> str:
    """'image' or 'video', according to the header."""
    with _opened(path) as file:
        return 'video' if 'tracklet' in _rows(file, path)[0] else 'image'


def _opened(path: str) -> TextIO:
    """The file as text: UTF-8, in which invalid bytes are kept, as in file names; or UTF-16 with a byte-order mark."""
    where = plain(path, 500)
    try:
        if not os.path.isfile(path):
            fault = 'is not a regular file' if os.path.exists(path) else 'does not exist'
            raise UserError(f'{where} {fault}; give a CSV file')
        with open(path, 'rb') as file:
            head = file.read(HEAD)
        if what := recognised(head, *SHEETS):
            raise UserError(f'{where} {what}')
        encoding = next((encoding for mark, encoding in WIDE.items() if head.startswith(mark)), 'utf-8-sig')
        return open(path, encoding=encoding, errors='surrogateescape', newline='')  # closed by the caller
    except OSError as error:
        raise UserError(f'{where} cannot be read: {error.strerror}') from error


def _rows(file: TextIO, path: str) -> tuple[list[str], list[str], Iterator[Row]]:
    """The names of the columns, the ignored columns, and the rows."""
    where = plain(path, 500)
    first = _first_line(file, where)
    delimiter = max(DELIMITERS, key=first.count)  # a comma if there is none
    header = [cell.strip().lower() for cell in next(csv.reader([first], delimiter=delimiter), [])]
    for column in NEEDED_COLUMNS:
        if column not in header:
            raise UserError(f'{where}, line 1: there is no column {column}; the columns are {", ".join(COLUMNS)}')
    for column in COLUMNS:
        if header.count(column) > 1:
            raise UserError(f'{where}, line 1: there are two columns {column}; remove one')
    return header, [cell for cell in header if cell not in COLUMNS], _read(file, where, header, delimiter)


def _first_line(file: TextIO, where: str) -> str:
    try:
        return file.readline(1 << 16)
    except UnicodeError as error:
        raise UserError(f'{where}, line 1: {plain(str(error))}; save the table as UTF-8') from error


def _read(file: TextIO, where: str, header: list[str], delimiter: str) -> Iterator[Row]:
    """The rows after the header; required cells are checked not to be empty, including tracklet if there is one."""
    places = [header.index(column) if column in header else len(header) for column in COLUMNS]
    cells, width, videos = itemgetter(*places), len(header), 'tracklet' in header
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            if len(fields) != width:
                if not fields:
                    continue
                _refuse(
                    where,
                    reader,
                    f'{len(fields)} cells, but line 1 has {width}; put texts that contain one into quotes',
                )
            fields.append('')
            image, *texts = cells(fields)
            row = (image, *map(_text, texts))
            _, pid, _, split, tracklet, _ = row
            if not image or not pid or '\0' in image or split not in SPLITS or (videos and not tracklet):
                _refuse(where, reader, _fault(dict(zip(COLUMNS, row, strict=True)), videos))
            yield reader.line_num + 1, row
    except csv.Error as error:
        _refuse(where, reader, f'{plain(str(error))}; save the table as CSV again')
    except UnicodeError as error:
        _refuse(where, reader, f'{plain(str(error))}; save the table as UTF-8')
    except OSError as error:
        raise UserError(f'{where} cannot be read: {error.strerror}') from error


def _text(cell: str) -> str:
    """A cell without spaces around it, and an integer that a program wrote as 1.0 as 1."""
    text = cell.strip()
    return text.split('.')[0] if text.endswith('0') and AS_FLOAT.fullmatch(text) else text


def _refuse(where: str, reader: Iterator, fault: str) -> NoReturn:
    raise UserError(f'{where}, line {reader.line_num + 1}: {fault}')  # type: ignore[attr-defined]  # of csv.reader


def _fault(row: dict[str, str], videos: bool) -> str:
    for column in (*NEEDED_COLUMNS, *(VIDEO[:1] if videos else ())):
        if not row[column]:
            return f'column {column} is empty'
    if '\0' in row['path']:
        return 'column path contains a NUL, which no name of a file does'
    return f'column split is {plain(repr(row["split"]), 40)}, not train, query or gallery'


def _images(rows: Iterator[Row], path: str) -> Parsed:
    subsets: Subsets = {split: [] for split in SPLITS}
    pids: dict[str, int] = {}
    cameras: dict[str, int] = {}
    blank, prefix = 0, os.path.join(os.path.dirname(path), '')
    for line, (image, pid, camid, split, _, _) in rows:
        blank = blank if camid else blank or line
        subsets[split].append((
            image if image.startswith(os.sep) else prefix + image,
            pids.setdefault(pid, len(pids)),
            cameras.setdefault(camid, len(cameras)),
        ))  # fmt: skip
    _check_cameras(blank, cameras, path)
    return subsets, list(pids), list(cameras)


def _videos(rows: Iterator[Row], path: str) -> Parsed:
    tracklets: dict[tuple[str, int, int, str], list[tuple[str, str, int]]] = {}  # frames: `frame`, path, line
    pids: dict[str, int] = {}
    cameras: dict[str, int] = {}
    blank, prefix = 0, os.path.join(os.path.dirname(path), '')
    for line, (image, pid, camid, split, tracklet, frame) in rows:
        blank = blank if camid else blank or line
        key = split, pids.setdefault(pid, len(pids)), cameras.setdefault(camid, len(cameras)), tracklet
        image = image if image.startswith(os.sep) else prefix + image
        tracklets.setdefault(key, []).append((frame, image, line))
    _check_cameras(blank, cameras, path)
    subsets: Subsets = {split: [] for split in SPLITS}
    for (split, number, camera, _), frames in tracklets.items():
        if any(frame for frame, _, _ in frames):
            frames.sort(key=lambda each: natural(each[0]))
            for (frame, _, first), (after, _, second) in pairwise(frames):
                if frame == after:
                    raise UserError(
                        f'{plain(path, 500)}, line {max(first, second)}: column frame is {plain(repr(frame), 40)}, as '
                        f'in line {min(first, second)} of the same tracklet; correct it, or remove one of the two'
                    )
        subsets[split].append((tuple(image for _, image, _ in frames), number, camera))
    return subsets, list(pids), list(cameras)


def _check_cameras(blank: int, cameras: dict[str, int], path: str) -> None:
    """Raise UserError if only some rows have a camera; `blank` is the first line without one."""
    if blank and len(cameras) > 1:
        raise UserError(
            f'{plain(path, 500)}, line {blank}: column camid is empty, but other lines have one; fill in all, or none '
            'if the cameras are unknown'
        )


def write(dataset: Dataset, path: str) -> int:
    """Write a data set as a table, completely or not at all; paths are relative to it. Returns the number of rows.

    Reading the table gives the same items in the same order, and the same numbers of persons and cameras. Unknown
    cameras remain unknown. If persons or cameras have names, the names are written.

    Raises:
        UserError: the file exists, or cannot be written, or the name of a person would be read as another one.
    """
    where = plain(path, 500)
    if os.path.lexists(path):
        raise UserError(f'{where} exists already; remove it, or give another name')
    video = dataset.kind == 'video'
    number = 0

    def save(temporary: Path) -> None:
        nonlocal number
        with open(temporary, 'w', encoding='utf-8', errors='surrogateescape', newline='') as file:
            table = csv.writer(file)
            table.writerow(COLUMNS if video else COLUMNS[:4])
            for rows in _as_rows(dataset, os.path.dirname(os.path.abspath(path))):
                table.writerows(rows)
                number += len(rows)

    try:
        write_whole(path, save)
    except OSError as error:
        raise UserError(f'{where} cannot be written ({error.strerror}); choose another folder') from error
    return number


def _written(name: str) -> str:
    """The name of a person, if it would be read as it is."""
    if _text(name) != name:
        raise UserError(
            f'the person {plain(repr(name), 100)} would be {plain(repr(_text(name)), 100)} in a table: rename it'
        )
    return name


def _as_rows(dataset: Dataset, folder: str) -> Iterator[list[tuple]]:
    """The rows of each item."""
    folders: dict[str, str] = {}  # folder of a file -> the same relative to the table

    def relative(name: str) -> str:
        head, tail = os.path.split(name)
        if head not in folders:
            place = os.path.relpath(head or os.curdir, folder)
            if place.startswith(os.pardir):  # if the table is read through a link, `..` is the parent of its target
                place = os.path.relpath(head or os.curdir, os.path.realpath(folder))
            folders[head] = '' if place == os.curdir else os.path.join(place, '')
        return folders[head] + tail

    tracklets = count(1)
    for split in SPLITS:
        for item in getattr(dataset, split):
            pid = dataset.train_pids[item[1]] if split == 'train' else item[1]
            camid = '' if dataset.no_cameras else dataset.camera_names.get(item[2], item[2])
            common = _written(dataset.name_of(pid)), camid, split
            if isinstance(item[0], str):
                yield [(relative(item[0]), *common)]
            else:
                number = next(tracklets)
                yield [(relative(path), *common, number, frame) for frame, path in enumerate(paths_of(item), start=1)]
