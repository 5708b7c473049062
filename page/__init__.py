"""The page of a test, made from its result files."""

import itertools
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from files.writing import write_whole
from page import cameras, charts, lists, runs
from runtime.errors import UserError


def write(save_dir: str | Path) -> Path:
    """Write report.html to --save-dir, completely or not at all, and return its path.

    Raises:
        UserError: the folder contains no test results, they are damaged or from two tests, or the page cannot be
        written.
    """
    run = runs.read(save_dir)
    return _write(
        Path(save_dir) / 'report.html',
        [*charts.history([run], run.losses), charts.cmc([run]), charts.distances(run), charts.embedding(run)],
        title=f'{run.summary["dataset"]}, {run.summary["arch"]}',
        runs=[run],
        notices=run.notices,
        cameras=cameras.view(run),
        **lists.examples(run),
    )


def compare(save_dirs: Sequence[str | Path], out: str | Path = 'compare.html') -> Path:
    """Write a page that compares two or more runs over the same queries, and return its path.

    Raises:
        UserError: as for `write`, or the queries differ.
    """
    tested = [runs.read(save_dir) for save_dir in save_dirs]
    first = tested[0]
    for run in tested[1:]:
        if run.queries != first.queries:
            raise UserError(
                f'{run.name} and {first.name} were tested with different queries; compare runs with the same queries'
            )
    valid = np.all([run.valid for run in tested], axis=0)  # (Q,) in every run
    if not valid.any():
        raise UserError(
            f'{first.name} and the other runs have no common query with a match; compare runs with the same gallery'
        )
    pairs = []
    for left, right in itertools.combinations(tested, 2):
        gain = (right.ap - left.ap)[valid, None]  # (V, 1)
        pairs.append((left, right, gain.mean(), *runs.interval(gain)[:, 0]))
    return _write(
        Path(out),
        [*charts.history(tested, ['loss']), charts.cmc(tested)],
        title=f'{len(tested)} runs on {first.summary["dataset"]}',
        runs=tested,
        notices=[f'{run.name}: {notice}' for run in tested for notice in run.notices] + runs.settings(tested),
        pairs=pairs,
        **lists.changes(tested, valid),
    )


def _write(path: Path, drawn: Iterable[charts.Chart | None], **content: object) -> Path:
    drawn = [chart for chart in drawn if chart]
    return render(path, 'report.html.j2', resamples=runs.RESAMPLES, charts=drawn, **content)


def render(path: Path, name: str, **content: object) -> Path:
    """Render the template `name` with its variables to `path`, completely or not at all, and return the path.

    Raises:
        UserError: it cannot be written.
    """
    import jinja2  # slow to import, and rarely needed

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters['shell'] = shlex.join
    environment.filters['percent'] = lambda share, sign='': f'{100 * share:{sign}.1f}'.replace('-', '−')
    page = environment.get_template(name).render(**content)
    try:
        write_whole(path, lambda file: file.write_bytes(page.encode('utf-8', 'replace')))
    except OSError as problem:
        raise UserError(f'{path} cannot be written ({problem.strerror}); choose another folder') from problem
    return path
