"""Notices about how a test differs from the training of its weights, for readers of its figures.

Such differences are not mistakes: a network may be tested at another size, or on a data set that it has not seen.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from arguments import TestOptions
from data_manager import fingerprint, names_of
from models.network import Network, Training
from readers.folder import how_drawn
from readers.tree import Dataset
from runtime.device import Run
from runtime.errors import plain

POOLING, RERANKING = ('seq_len', 'pool'), ('k1', 'k2', 'lambda_value')
# The options of a test outside the recipe that change its figures
CHANGING = (*POOLING, 'distance', 'flip_test', 'any_camera', 'multi_query', 'rerank', *RERANKING)


def as_in_project(options: TestOptions, model: Network) -> TestOptions:
    """The options with which the project of the weights tests them, except for those on the command line.

    Both kinds are printed. The options do not change without --evaluate, for weights of this project, or if the
    project's test is unknown.
    """
    if not options.evaluate or not model.trained:
        return options
    trained = model.trained
    theirs = {name: value for name, value in trained.test.items() if hasattr(options, name)}
    recorded = trained.options.get('arch')  # needed for timm:NAME, which parameter names do not show
    if not theirs:
        known = trained.arch or (recorded if isinstance(recorded, str) and 'arch' not in options.given else '')
        unusual = options.distance != 'euclidean' and 'distance' not in options.given  # the strong script's
        if unusual and not trained.options and model.bottleneck is None:
            print(f'Tested with --distance euclidean: {trained.where} has no neck, and records no distance')
            options = replace(options, distance='euclidean')
        return replace(options, arch=known or options.arch)
    taken = {name: value for name, value in theirs.items() if name not in options.given}
    words = [_written(name, value) for name, value in taken.items()]
    given = [_written(name, getattr(options, name)) for name in theirs if name not in taken]
    also = f', but as given with {" ".join(given)}' if given else ''
    print(f'Tested as the project of {trained.where} does ({trained.project}): {" ".join(words) or "nothing"}{also}')
    return replace(options, arch=trained.arch or options.arch, **taken)


def of_test(model: Network, dataset: Dataset, options: TestOptions, run: Run) -> list[str]:
    """One line for each known difference between this test and the training of the weights."""
    trained = model.trained
    if trained is None:
        return ['neither --resume nor --pretrained gave weights, so the network is random']
    notices = of_size(trained, options.height, options.width)
    if trained.missing:
        notices.append(f'not in {trained.where}, and therefore random: {trained.missing}')
    if not trained.of_imagenet:
        pooling = POOLING if dataset.kind == 'video' else ()
        ours = {name: getattr(options, name) for name in (*pooling, 'distance', 'flip_test', 'interpolation')}
        ours['precision'] = run.test_precision
        theirs = dict(trained.options)
        if 'interpolation' in theirs:
            theirs['interpolation'] = theirs['interpolation'] or model.interpolation
        if _training_set(trained.options.get('dataset')) == _training_set(options.dataset):
            ours['dataset'] = options.dataset  # the protocols may differ
        if pair := _differences(theirs, ours):
            notices.append('{} was tested with {} during training, and now with {}'.format(trained.where, *pair))
        notices += of_data(trained, dataset, options.dataset)
    return notices


def of_size(trained: Training, height: int, width: int) -> list[str]:
    """The notices that need no data set: about the kind of weights and the size of the images."""
    if trained.of_imagenet:
        return [f'the network has ImageNet weights ({trained.where}) and was not trained for re-ID']
    if pair := _differences(trained.options, {'height': height, 'width': width}):
        return ['{} was trained with {}, and is used with {}'.format(trained.where, *pair)]
    return []


def of_data(trained: Training, dataset: Dataset, name: str) -> list[str]:
    """At most one notice about the data; for files of other projects only the number of persons is known.

    For a data set without a training set only the name is compared.
    """
    where, theirs = trained.where, trained.options.get('dataset')
    together = names_of(theirs) if isinstance(theirs, str) else []
    part = _training_set(name) in map(_training_set, together)
    if part and trained.options.get('combine') is True:
        return [f'{where} was trained on query and gallery of {name} too (--combine): its figures are of known persons']
    share, seed = trained.options.get('test_share'), trained.options.get('seed')
    how = how_drawn(share, seed) if isinstance(share, float) and isinstance(seed, int) else ''
    if how and part and dataset.drawn and f'({how})' not in dataset.drawn:
        return [f'{where} was trained on {name} with {how}: persons of that training may be among those tested']
    if part and (len(together) > 1 or trained.options.get('validate')):  # it is unknown which part was trained on
        return []
    pair = _differences(trained.options, {'dataset': name} if name else {})
    if pair and _training_set(theirs) != _training_set(name):
        return ['{} was trained with {}, and is tested with {}'.format(where, *pair)]
    if dataset.untrainable:
        return []
    now = fingerprint(dataset)
    if not pair and trained.fingerprint not in (None, now):
        return [f'{where} was trained on other files of {dataset.name}: fingerprint {trained.fingerprint}, now {now}']
    if trained.num_pids not in (None, dataset.num_train_pids):
        return [f'{where} was trained on {trained.num_pids} persons, and {dataset.name} has {dataset.num_train_pids}']
    return []


def _training_set(dataset: object) -> str:
    """The name of a data set without its protocol: mars and mars_official share a training set."""
    return str(dataset).removesuffix('_official')


def of_resumed(trained: Training, options: Mapping[str, Any]) -> list[str]:
    """A notice if the figures of a run's tests change when it resumes with these `options`, which its recipe allows."""
    known = {field.name: field.default for field in fields(TestOptions)} if trained.options else {}
    theirs = {**known, **trained.options}  # options newer than the file had their defaults
    reranks = options.get('rerank') or theirs.get('rerank')
    names = [name for name in ('precision', *CHANGING) if reranks or name not in RERANKING]
    ours = {name: options[name] for name in names if name in options}
    if pair := _differences(theirs, ours):
        return [
            'the tests of this run had {}, and from now on have {}: their figures are not comparable, and '
            'best_model.pth.tar is chosen among both'.format(*pair)
        ]
    return []


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[str, str] | None:
    """The options that differ, as on a command line, with their values and with ours; None if none differs.

    An option that the file lacks, or stores with another type, is unknown and not compared.
    """
    pairs = {name: (_tested(name, theirs.get(name)), _tested(name, value)) for name, value in ours.items()}
    unlike = {name: pair for name, pair in pairs.items() if type(pair[0]) is type(pair[1]) and pair[0] != pair[1]}
    if not unlike:
        return None
    one, other = (' '.join(_written(name, pair[side]) for name, pair in unlike.items()) for side in (0, 1))
    return one, other


def _tested(name: str, value: object) -> object:
    """The precision of a test is fp32 unless another is requested."""
    return 'fp32' if (name, value) == ('precision', 'auto') else value


def _written(name: str, value: object) -> str:
    flag = {'dataset': '-d', 'lambda_value': '--lambda'}.get(name, f'--{name.replace("_", "-")}')
    if isinstance(value, bool):
        return flag if value else f'no {flag}'
    return f'{flag} {plain(str(value))}'
