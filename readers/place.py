"""Finds the folder of a published data set."""

import os
from collections.abc import Mapping, Sequence

from runtime.errors import UserError, plain

TOYS = ('market1501', 'mars')  # the data sets with a toy version
ARCHIVES = ('.zip', '.rar', '.7z', '.tar', '.tar.gz', '.tgz')


def find(
    data_dir: str, name: str, folders: Sequence[str], parts: Mapping[str, str], training: Sequence[str]
) -> tuple[str, str]:
    """The folder of a data set, and a message about missing parts that training needs, '' if there are none.

    Searches data_dir/FOLDER and data_dir/FOLDER/FOLDER, for any of `folders` in any spelling (case, signs), and
    data_dir itself; a folder with all parts is preferred.

    parts: the required parts, each with a hint for the error message
    training: the parts that are needed for training only

    Raises:
        UserError: no such folder is found; the message shows the expected folders.
    """
    places = [os.path.join(data_dir, folder) for folder in folders] + _spelled(data_dir, folders)
    places += [os.path.join(place, folder) for place in places for folder in folders]
    places += [inner for place in places for inner in _spelled(place, folders)]
    places = list(dict.fromkeys([*places, os.fspath(data_dir)]))
    missing = {place: [part for part in parts if not os.path.exists(os.path.join(place, part))] for place in places}
    untestable = {place: not {*missing[place]} <= {*training} for place in places}
    nearest = min(places, key=lambda place: (untestable[place], len(missing[place])))
    if nearest == os.fspath(data_dir) and not untestable[nearest]:
        print(f"--data-dir '{data_dir}' is the data set itself")
    if not missing[nearest]:
        return nearest, ''

    if len(missing[nearest]) < len(parts):
        fault = f'{nearest} contains no {", no ".join(missing[nearest])}'
    else:
        fault = f"no {' or '.join(folders)} in --data-dir '{data_dir}'"
    tree = [os.path.join(data_dir, folders[0]) + os.sep]
    tree += [f'    {part}{"" if "." in part else os.sep}'.ljust(34) + hint for part, hint in parts.items()]
    advice = 'see docs/data.md for what it consists of'
    if name in TOYS:
        advice = f'see data/README.md for where to download it; -d toy_{name} draws a toy in this format'
    if name.startswith('toy_'):
        advice = 'remove that folder, and the toy is drawn again'
    elif archives := _spelled(data_dir, folders, ARCHIVES):
        advice = f'unpack {plain(archives[0])} there'
    message = '\n'.join([f'{fault}; expected:', *(line.rstrip() for line in tree), advice])
    if untestable[nearest]:
        raise UserError(message)
    return nearest, message


def _spelled(folder: str, names: Sequence[str], endings: Sequence[str] = ('',)) -> list[str]:
    """The entries of a folder that match one of `names`, ignoring case and signs between the letters and digits."""
    try:
        entries = sorted(os.listdir(folder))
    except OSError:
        return []
    wanted = {_letters(name) + _letters(ending) for name in names for ending in endings}
    return [os.path.join(folder, entry) for entry in entries if _letters(entry) in wanted and entry.isprintable()]


def _letters(name: str) -> str:
    return ''.join(filter(str.isalnum, name.lower()))
