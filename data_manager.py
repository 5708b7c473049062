"""Data sets by name: `init_dataset(name)` -> train, query, gallery; `init_datasets` for those of an experiment.

A scan reads only file names and tables: no image is opened or looked up on disk. Commands:

    python data_manager.py -d market1501                          # opens every image, and reports faults
    python data_manager.py -d market1501 --write-csv table.csv    # writes it as a table, for -d csv:table.csv
    python data_manager.py -d market1501 --sheet sheet.html       # writes a contact sheet of its persons

Several data sets, -d A,B, are checked one by one, and written as one table.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import toy
from files.paths import without_links
from readers import cuhk03, folder, table
from readers.faults import check
from readers.joined import Joined, combined
from readers.market1501 import Market, Market1501
from readers.market1501_500k import Market1501With500k
from readers.mars import Mars
from readers.msmt17 import Msmt17
from readers.split import hold_out
from readers.tree import Dataset, paths_of
from runtime import commands, values
from runtime.cores import usable_cores
from runtime.errors import UserError, plain


def toy_market1501(data_dir: str, hard: bool = False) -> Market1501:
    """A toy in Market1501's format, drawn if it does not exist; if `hard`, with much occlusion and changes of light."""
    name = 'toy_market1501_hard' if hard else 'toy_market1501'
    toy.draw_market1501(_place(data_dir, name), hard=hard)
    return Market1501(data_dir, name=name)


def toy_mars(data_dir: str) -> Mars:
    """A toy in MARS's format, drawn if it does not exist."""
    toy.draw_mars(_place(data_dir, 'toy_mars'))
    return Mars(data_dir, name='toy_mars')


def _place(data_dir: str, name: str) -> str:
    """The folder of a toy: `data_dir` itself if it has the toy's name."""
    itself = os.path.basename(os.path.abspath(data_dir)) == name
    return data_dir if itself else os.path.join(data_dir, name)


# A data set is a line in one of these two: its name, and the class that reads it from `data_dir`.
IMAGES: dict[str, Callable[[str], Dataset]] = {
    'market1501': Market1501,
    'market1501_500k': Market1501With500k,
    'msmt17': Msmt17,
    'cuhk03_detected': cuhk03.detected,
    'cuhk03_labeled': cuhk03.labeled,
    'toy_market1501': toy_market1501,
    'toy_market1501_hard': partial(toy_market1501, hard=True),
}
TRACKLETS: dict[str, Callable[[str], Dataset]] = {
    'mars': Mars,
    'mars_official': partial(Mars, official=True),
    'toy_mars': toy_mars,
}
# The user's own data, NAME:PLACE: the class that reads PLACE, and the function that returns 'image' or 'video' for it.
OWN: dict[str, tuple[Callable[..., Dataset], Callable[[str], str]]] = {
    'csv': (table.Table, table.kind_of),
    'folder': (folder.Folder, folder.kind_of),
    'market': (Market, lambda place: 'image'),
}
OWN_NAMES = 'csv:FILE, folder:DIR or market:DIR'


def get_names(kind: str | None = None) -> list[str]:
    """The names that `init_dataset` accepts: all of them, or those of one kind, 'image' or 'video'; without OWN."""
    return [*(IMAGES if kind != 'video' else ()), *(TRACKLETS if kind != 'image' else ())]


def names_of(text: str) -> list[str]:
    """The names in a list such as A,B. A comma in a path is a separator only if a known name follows it."""
    known = '|'.join(map(re.escape, get_names()))
    return re.split(rf',(?=(?:{known})(?:,|$)|(?:{"|".join(OWN)}):)', text)


def kind_of(name: str) -> str:
    """'image' or 'video': what a data set contains; '' if there is none of this name.

    Raises UserError if the user's own data do not exist.
    """
    form, place = _own(name)
    return OWN[form][1](place) if form else 'image' if name in IMAGES else 'video' if name in TRACKLETS else ''


def _own(name: str) -> tuple[str, str]:
    """Form and place of the user's own data; two empty strings for any other name."""
    form, colon, place = name.partition(':')
    return (form, values.path(place)) if colon and form in OWN else ('', '')


def init_dataset(
    name: str, data_dir: str = 'data', train: bool = True, test_share: float = 0.5, seed: int = 1
) -> Dataset:
    """Read the data set `name` from `data_dir` and print its statistics; a toy is drawn first if it does not exist.

    name: one of `get_names()`, or of OWN_NAMES, which need no `data_dir`
    train: whether the training set is needed; if not, a missing or unusable one is left empty
    test_share, seed: for a folder without a split, the share of the persons drawn for the test, and the seed

    Raises UserError for an unknown name, for a toy that cannot be drawn, for a training set that is needed but cannot
    be used, and in the cases listed by the class.
    """
    form, place = _own(name)
    if not form and name not in get_names():
        raise UserError(f"there is no data set '{plain(name)}': choose one of {', '.join(get_names())}, or {OWN_NAMES}")
    print(f'Initializing dataset {plain(name, 500)}')
    if form:
        drawn = {'test_share': test_share, 'seed': seed} if form == 'folder' else {}
        dataset = OWN[form][0](place, name, **drawn)
    else:
        dataset = _from_data_dir(name, data_dir)
    if dataset.untrainable and train:
        raise UserError(dataset.untrainable)
    if dataset.untrainable:
        print(f'It can be tested, but not trained on: {_why(dataset)}')
    return dataset


def _from_data_dir(name: str, data_dir: str) -> Dataset:
    try:
        dataset = (IMAGES | TRACKLETS)[name](data_dir)
    except OSError as error:
        raise UserError(f'{name} cannot be read or drawn in {data_dir}: {error}; choose another --data-dir') from error
    if not isinstance(dataset, Dataset):  # any object with the three lists and perhaps multi_query()
        described = dataset
        dataset = Dataset(name, described.train, described.query, described.gallery)
        dataset.multi_query = getattr(described, 'multi_query', dataset.multi_query)
    return dataset


def _why(dataset: Dataset) -> str:
    """Why a data set cannot be trained on, in one line; '' if it can."""
    return plain(dataset.untrainable, 500).removesuffix('; expected:')


class Choice(Protocol):
    """The options of an experiment that name its data sets, see `arguments`."""

    @property
    def dataset(self) -> str: ...
    @property
    def targets(self) -> str: ...
    @property
    def select(self) -> str: ...
    @property
    def combine(self) -> bool: ...
    @property
    def validate(self) -> float: ...
    @property
    def data_dir(self) -> str: ...
    @property
    def test_share(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def evaluate(self) -> bool: ...


def init_datasets(options: Choice) -> Dataset:
    """The data set that an experiment trains on, joined from those of -d.

    Its `targets` are tested: those of -t, or otherwise those of -d that have query and gallery; the one of --select
    comes first. There may be none with --combine, which also trains on query and gallery, or with --validate, which
    holds persons out of each data set for `validation`. With --evaluate, nothing is combined or held out; if -t is also
    given, nothing of -d is read, and the first target is returned.

    Raises UserError like `init_dataset` and `Joined`; if there is nothing to test, or the data set of --select is not
    tested; and if no person can be held out, or too few are left to train on.
    """
    names, tested = names_of(options.dataset), names_of(options.targets) if options.targets else []
    combine, validate = (False, 0.0) if options.evaluate else (options.combine, options.validate)

    def read(name: str, train: bool) -> Dataset:
        return init_dataset(name, options.data_dir, train, options.test_share, options.seed)

    if len(names) == 1 and not (tested or combine or validate):
        return read(options.dataset, not options.evaluate)
    sets = {name: read(name, not options.evaluate) for name in names if not (options.evaluate and tested)}
    targets = {
        name: sets[name] if name in sets else read(name, False)
        for name in tested or names
        if not (combine and name in names)
    }
    for name, dataset in list(targets.items()):
        if not tested and not (dataset.query and dataset.gallery):
            print(f'{plain(name, 500)} has no {"gallery" if dataset.query else "query"}, and is not tested')
            del targets[name]
    _check_targets([*targets], options)
    ordered = [targets[name] for name in sorted(targets, key=lambda name: name != options.select)]
    dataset = ordered[0] if options.evaluate else _training_set([*sets.values()], options)
    for target in ordered if not options.evaluate and (tested or combine or len(sets) > 1) else ():
        _note_shared(dataset, target)
    dataset.targets = ordered
    return dataset


def _check_targets(targets: list[str], options: Choice) -> None:
    """Report data sets that are not tested because of --combine; UserError without a target, or that of --select."""
    for name in names_of(options.dataset) if options.combine and not options.evaluate else ():
        print(f'{plain(name, 500)} is not tested: --combine trains on its query and gallery')
    if options.select and options.select not in targets:
        listed = ', '.join(plain(name, 500) for name in targets)
        raise UserError(
            f'--select {plain(options.select, 500)}: it is not tested; '
            f'{f"choose one of {listed}" if targets else "give the data sets to test with -t"}'
        )
    if not targets and (options.evaluate or not (options.combine or options.validate)):
        raise UserError(
            f'-d {plain(options.dataset, 500)}: there is nothing to test, as none of them has query and gallery; give '
            '-t NAME'
        )
    if not targets:
        print('No data set is left to test')


def _training_set(sets: Sequence[Dataset], options: Choice) -> Dataset:
    """The joined training sets, including query and gallery with --combine; with --validate also a `validation`."""
    if options.combine:
        sets = [combined(dataset) for dataset in sets]
    if not options.validate:
        return sets[0] if len(sets) == 1 else Joined(sets)
    pairs = [hold_out(dataset, options.validate, options.seed) for dataset in sets]
    for dataset, held in pairs:
        if held is None:
            print(f'No person of {plain(dataset.name, 500)} is held out: none {_CANNOT[dataset.no_cameras]}')
    validations = [held for _, held in pairs if held is not None]
    if not validations:
        raise UserError(
            f'--validate {options.validate:g}: no person can be held out of -d {plain(options.dataset, 500)}, '
            f'as none {_CANNOT[sets[0].no_cameras]}; omit the option'
        )
    rest = pairs[0][0] if len(pairs) == 1 else Joined([rest for rest, _ in pairs])
    rest.validation = validations[0] if len(validations) == 1 else Joined(validations)
    return rest


_CANNOT = {False: 'is seen by two cameras', True: 'has two images'}


def _note_shared(dataset: Dataset, target: Dataset) -> None:
    """Report how many test items are also training items, for example in another copy of the data."""
    trained = set(without_links(paths_of(item)[0] for item in dataset.train))
    items = [*target.query, *target.gallery]
    if number := sum(path in trained for path in without_links(paths_of(item)[0] for item in items)):
        print(f'Notice: {number} of the {len(items)} items of {plain(target.name, 500)} that are tested are trained on')


def fingerprint(dataset: Dataset, subsets: Sequence[str] = ('train', 'query', 'gallery')) -> str:
    """16 hexadecimal digits that identify the file names, persons and camids of `subsets`, regardless of the folder."""
    digest = hashlib.sha256()
    for subset in subsets:
        for item in getattr(dataset, subset):
            _, pid, camid = item
            person = dataset.train_pids[pid] if subset == 'train' else pid
            names = [os.path.basename(path) for path in paths_of(item)]
            digest.update(
                f'{dataset.names.get(person, pid)} {camid} {" ".join(names)}\n'.encode(errors='surrogateescape')
            )
    return digest.hexdigest()[:16]


def digests(dataset: Dataset) -> list[str]:
    """16 hexadecimal digits for the name of the person behind each training label.

    Checkpoints record them, to compare the persons behind the labels of two runs without naming the persons.
    """
    names = (dataset.name_of(pid) for pid in dataset.train_pids)
    return [hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:16] for name in names]


# ---- the commands ----

MOST_CASES = 10  # listed cases of a note


def main() -> int:
    parser = commands.Parser(description='Check every image of a data set, or write its table or a contact sheet.')
    names = f'{", ".join(get_names())}, {OWN_NAMES}'
    parser.add_argument('-d', '--dataset', default='market1501', help=f'{names} (default: market1501)')
    parser.add_argument('--data-dir', type=values.path, default='data', help='where the data sets are (default: data)')
    parser.add_argument(
        '-j', '--jobs', type=values.positive_int, default=usable_cores(), help='processes (default: all usable cores)'
    )
    parser.add_argument(
        '--test-share', type=values.fraction, default=0.5,
        help='share of the persons of folder:DIR without a split to draw for the test (default: 0.5)',
    )  # fmt: skip
    parser.add_argument('--seed', type=values.seed, default=1, help='seed for drawing them (default: 1)')
    parser.add_argument('--write-csv', type=values.path, metavar='FILE', help='write a table of the data set instead')
    parser.add_argument(
        '--sheet', type=values.path, metavar='FILE',
        help='write a contact sheet of its persons and cameras instead, a page whose name ends in sheet.html',
    )  # fmt: skip
    args = parser.parse_args()
    started = time.monotonic()
    datasets = {
        name: init_dataset(name, args.data_dir, False, args.test_share, args.seed) for name in names_of(args.dataset)
    }
    if not (args.write_csv or args.sheet):
        return max(_report_faults(dataset, name, args.jobs, started) for name, dataset in datasets.items())
    dataset = Joined([*datasets.values()]) if len(datasets) > 1 else next(iter(datasets.values()))
    if args.write_csv:
        print(f'Wrote {plain(args.write_csv, 500)}: {table.write(dataset, args.write_csv)} rows')
    if args.sheet:
        from page import sheet  # rarely needed

        print(f'Wrote {plain(str(sheet.write(dataset, args.sheet)), 500)}, {sheet.PRIVATE}')
    return 0


def _report_faults(dataset: Dataset, name: str, jobs: int, started: float) -> int:
    """Print faults and notes; 1 if there are faults, 0 otherwise."""
    faults = 0
    for is_fault, what, cases in check(dataset, _why(dataset), jobs):
        if not cases:
            continue
        faults += is_fault
        all_listed = is_fault or len(cases) <= MOST_CASES
        listed = cases if all_listed else [*cases[:MOST_CASES], f'and {len(cases) - MOST_CASES} more']
        lines = [f'{"fault" if is_fault else "note"}: {what}: {len(cases)}', *(plain(case, 1000) for case in listed)]
        print('\n    '.join(lines))
    kinds = f'{faults} kind{"" if faults == 1 else "s"} of faults'
    print(f'{plain(name, 500)}: {kinds}; {time.monotonic() - started:.0f} s')
    return 1 if faults else 0


if __name__ == '__main__':
    commands.run(main)
