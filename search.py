"""Finds the images in a gallery that are nearest to each query.

    python search.py --weights log/demo/best_model.pth.tar --gallery pictures --query person.jpg

The features of the gallery are kept in an index, by default in the user's cache folder; only new and changed files are
computed. `--calibrate -d market1501` measures distances on labelled data; with `--false-match-rate`, a query is then
reported as unknown if its nearest image is farther than the threshold for this rate.
"""

import argparse
import contextlib
import datetime
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data_manager
import evaluation
import ranking
from arguments import TestOptions
from batches.decoding import read_image
from extract import FeatureExtractor, add_options, extractor_of
from extraction.images import IMAGES_HELP, files_of, folders_of
from files import index
from files.paths import file_id
from page import found
from runtime import commands, notices, values
from runtime.errors import Unreadable, UserError, plain
from runtime.testset import check_items

BATCHES_AT_ONCE = 8  # batches per transaction of the index
PRINTED_RATES = (1e-2, 1e-3, 1e-4, 1e-5)  # that --calibrate prints
FEW = 30  # with fewer false matches a threshold is uncertain by more than a third (Doddington's rule of 30)


def refresh(
    place: index.Index, extractor: FeatureExtractor, files: Sequence[str], folders: Sequence[str]
) -> dict[str, str]:
    """Update the index with the files of a gallery; return why some of them could not be read.

    folders: those that were searched; files that are no longer in them are removed from the index
    """
    stale, unread = place.stale(files), dict[str, str]()
    names = list(stale)
    with tqdm(total=len(names), desc='Indexing', unit='image', leave=False, disable=None) as bar:
        step = BATCHES_AT_ONCE * extractor.batch
        for some in (names[start : start + step] for start in range(0, len(names), step)):
            readable, features = _features(extractor, some, unread)
            place.add({name: stale[name] for name in readable}, features)
            bar.update(len(some))
    place.drop(folders, [file for file in files if file not in unread], unread)
    place.tidy()
    return unread


def _features(
    extractor: FeatureExtractor, files: Sequence[str], unread: dict[str, str]
) -> tuple[Sequence[str], Tensor]:
    """The readable files and their features; the reasons why the others cannot be read are added to `unread`."""
    try:
        return files, extractor(files)
    except Unreadable:
        readable = []
    for file in files:
        try:
            read_image(file)
            readable.append(file)
        except Unreadable as problem:
            unread[file] = str(problem)
    return readable, extractor(readable)


def report(unread: Mapping[str, str]) -> None:
    """Print why images were left out."""
    for reason in unread.values():
        print(f'Left out: {plain(reason, 1000)}', file=sys.stderr)


def calibrate(extractor: FeatureExtractor, name: str, data_dir: str) -> dict[str, Any]:
    """Histograms, for JSON, of the distances between features of the same person and of different persons.

    The pairs are those of a test on the labelled data set: each query with each gallery item, except for pairs of one
    person in one camera, or, if the cameras are unknown, of one file. If the weights were trained on a folder, its test
    persons are drawn as in that training. Differences between the data and those of the training are reported on
    stderr.

    Raises:
        UserError: the data set has tracklets or cannot be read, or no query has a match.
    """
    if data_manager.kind_of(name) == 'video':
        raise UserError(f'-d {plain(name, 500)}: it has tracklets, but thresholds are for images; choose another')
    trained = extractor.trained
    dataset = data_manager.init_dataset(name, data_dir, train=False, **drawn_in(trained.options, name))
    for notice in [] if trained.of_imagenet else notices.of_data(trained, dataset, name):
        print(f'Notice: {notice}', file=sys.stderr)
    q_pids, g_pids, q_camids, g_camids = check_items(dataset, dataset.no_cameras, extractor.run)
    options = TestOptions(
        height=extractor.height, width=extractor.width, interpolation=extractor.interpolation,
        flip_test=extractor.mirrors, test_batch=extractor.batch, workers=extractor.workers,
    )  # fmt: skip
    with extractor.arithmetic():
        query, gallery = (
            evaluation.extract(extractor.network, items, options, extractor.run)[0]
            for items in (dataset.query, dataset.gallery)
        )
    result = ranking.rank(query, gallery, q_pids, g_pids, q_camids, g_camids, distance=extractor.distance)
    return {
        'dataset': name,
        'fingerprint': data_manager.fingerprint(dataset, ('query', 'gallery')),
        'date': datetime.date.today().isoformat(),
        'distance': extractor.distance,
        'edges': result.edges.tolist(),
        'same': result.match_histogram.tolist(),
        'others': result.other_histogram.tolist(),
    }


def drawn_in(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The arguments of `init_dataset` with which training on `name` drew its test persons; {} if unknown."""
    share, seed = options.get('test_share'), options.get('seed')
    if (
        name not in data_manager.names_of(str(options.get('dataset')))
        or type(share) is not float
        or not 0 < share < 1
        or type(seed) is not int
    ):
        return {}
    return {'test_share': share, 'seed': seed}


def threshold_of(calibration: dict[str, Any], rate: float) -> dict[str, Any]:
    """The largest threshold below which at most `rate` of the distances between two persons lie, rounded to a bin.

    Returns it with its statistics: the number of `pairs` of two persons, `false_matches`, those below the threshold,
    and `missed`, the fraction of the pairs of one person that are not below it; None if there are no such pairs.

    Raises:
        UserError: the rate corresponds to less than one pair.
    """
    edges, same, others = (np.array(calibration[name]) for name in ('edges', 'same', 'others'))
    nearer, pairs = others.cumsum(), int(others.sum())
    bins = int((nearer <= rate * pairs).sum())  # below the threshold
    if rate * pairs < 1 or not bins or not nearer[bins - 1]:
        raise UserError(
            f'--false-match-rate {rate:g} cannot be measured with {pairs} pairs of two persons in '
            f'{plain(str(calibration["dataset"]))}: choose a higher one, or calibrate on more data'
        )
    return {
        'threshold': float(edges[bins]),
        'false_match_rate': rate,
        'dataset': calibration['dataset'],
        'pairs': pairs,
        'false_matches': int(nearer[bins - 1]),
        'pairs_of_one_person': int(same.sum()),
        'missed': float(same[bins:].sum() / same.sum()) if same.sum() else None,
    }


def words_of(limit: dict[str, Any]) -> str:
    """A threshold and its statistics, in words."""
    if 'pairs' not in limit:
        return f'distance below {limit["threshold"]:g}'
    few = ', too few for an accurate threshold' if limit['false_matches'] < FEW else ''
    number = limit['pairs_of_one_person']
    return (
        f'distance below {limit["threshold"]:.6g}: false match rate {limit["false_match_rate"]:g} in '
        f'{limit["pairs"]} pairs of two persons of {plain(str(limit["dataset"]))} ({limit["false_matches"]} false '
        f'matches{few})' + (f', {limit["missed"]:.1%} of {number} pairs of one person missed' if number else '')
    )


def search(
    queries: Sequence[Sequence[str]], features: Tensor, gallery: index.Gallery, k: int, distance: str,
    threshold: float | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """The k nearest images of each query, excluding the query's own files, for JSON and for the page.

    queries: the files of each query; features: (Q, D)
    """
    files = [{file_id(path) for path in query} for query in queries]
    most = min(len(gallery.paths), k + 2 * max(map(len, queries)))  # more links to a query's files shorten the list
    places, distances = gallery.nearest(features, most, distance)
    results = []
    for query, own_files, row, far in zip(queries, files, places.tolist(), distances.tolist(), strict=True):
        near = [(gallery.paths[place], each) for place, each in zip(row, far, strict=True) if place >= 0]
        near = [(path, each) for path, each in near if file_id(path) not in own_files][:k]
        within = [None if threshold is None else each < threshold for _, each in near]
        results.append(
            {
                'query': list(query),
                'unknown': None if threshold is None else not any(within),
                'results': [
                    {'rank': rank, 'path': path, 'distance': each, 'match': match}
                    for rank, ((path, each), match) in enumerate(zip(near, within, strict=True), 1)
                ],
            }
        )
    return results


def show(results: Sequence[dict[str, Any]], limit: dict[str, Any] | None) -> None:
    """Print a table for each query."""
    for result in results:
        first, *others = result['query']
        more = f' and {len(others)} more' if others else ''
        verdict = '' if limit is None else ': unknown' if result['unknown'] else ': known'
        print(f'{plain(first, 1000)}{more}{verdict}')
        for each in result['results']:
            sign = {None: '', True: '  match', False: '  too far'}[each['match']]
            print(f'{each["rank"]:4}  {each["distance"]:<10.5g}  {plain(each["path"], 1000)}{sign}')
    if limit:
        print(f'Matches: {words_of(limit)}')


def parse() -> argparse.Namespace:
    parser = commands.Parser(description='Find the images in a gallery that are nearest to each query.')
    names = ', '.join([*data_manager.get_names('image'), data_manager.OWN_NAMES])
    parser.add_argument('--gallery', nargs='+', default=[], type=values.path, metavar='IMAGES', help=IMAGES_HELP)
    parser.add_argument('--query', nargs='+', default=[], type=values.path, metavar='IMAGES', help='the same')
    parser.add_argument('-k', type=values.positive_int, default=10, help='images listed for each query (default: 10)')
    parser.add_argument('--fuse', action='store_true', help='all queries are pictures of one person: use their mean')
    parser.add_argument(
        '--threshold', type=values.positive_float, help='images at this distance or farther do not match'
    )
    parser.add_argument('--false-match-rate', type=values.fraction, metavar='R', help='the same, from a calibration')
    parser.add_argument('--calibrate', action='store_true', help='measure distances on -d, and store them')
    parser.add_argument('-d', '--dataset', help=f'to calibrate on: {names}')
    parser.add_argument('--data-dir', type=values.path, default='data', help='where the data sets are (default: data)')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    parser.add_argument('--page', type=values.page, metavar='FILE', help='write a page that shows the images')
    parser.add_argument('--index', type=values.path, default=str(index.default_root()), help='(default: %(default)s)')
    parser.add_argument(
        '--forget',
        action='store_true',
        help='remove the index of --weights, used with the same options, or all indices',
    )
    add_options(parser)
    args = parser.parse_args()
    if bool(args.gallery) != bool(args.query) or not (args.gallery or args.calibrate or args.forget):
        parser.error('give --gallery and --query, or --calibrate -d DATASET, or --forget')
    if not args.query and (args.page or args.fuse or args.threshold is not None or args.false_match_rate is not None):
        parser.error('--page, --fuse, --threshold and --false-match-rate are for a search: give --gallery and --query')
    if args.calibrate and args.json:
        parser.error('--json: --calibrate prints no JSON; run it first, without a query')
    if args.calibrate and not args.dataset:
        parser.error('--calibrate: -d is missing, the labelled data set')
    if args.dataset and not args.calibrate:
        parser.error('-d is the data set of --calibrate: add this option, or remove -d')
    if args.threshold is not None and args.false_match_rate is not None:
        parser.error('--threshold and --false-match-rate: give one of them')
    if args.index.startswith('~'):
        parser.error('--index: your home folder is not known; give a folder')
    if args.forget and (args.gallery or args.calibrate):
        parser.error('--forget removes the index, and does nothing else')
    return args


def limit_of(args: argparse.Namespace, place: index.Index, distance: str) -> dict[str, Any] | None:
    """The threshold that the options request; None if they request none."""
    if args.threshold is not None:
        return {'threshold': args.threshold}
    if args.false_match_rate is None:
        return None
    calibration = place.fact('calibration')
    if not calibration or calibration['distance'] != distance:
        raise UserError('--false-match-rate: these weights are not calibrated; run --calibrate -d DATASET')
    return threshold_of(calibration, args.false_match_rate)


def main() -> None:
    args = parse()
    if args.forget:
        digest = extractor_of(args).digest if args.weights else ''
        none = f'There is no index {"of these weights and options " if digest else ""}in {args.index}'
        print('\n'.join(f'Removed {folder}' for folder in index.forget(args.index, digest)) or none)
        return
    files = files_of(args.gallery)
    pictures: Sequence[str] = files_of(args.query)
    extractor = extractor_of(args)
    place = index.Index(args.index, extractor.digest, extractor.feat_dim)
    if args.calibrate:
        calibration = calibrate(extractor, args.dataset, args.data_dir)
        place.keep('calibration', calibration)
        print(f'Calibrated on {plain(args.dataset, 500)}: {sum(calibration["others"])} pairs of two persons')
        for rate in PRINTED_RATES:
            with contextlib.suppress(UserError):  # too few pairs
                print(f'Match: {words_of(threshold_of(calibration, rate))}')
    if not pictures:
        return
    limit = limit_of(args, place, extractor.distance)
    files = list(dict.fromkeys(map(os.path.abspath, files)))  # one file may be named in several ways
    folders = [os.path.abspath(folder) for folder in folders_of(args.gallery)]
    unread = refresh(place, extractor, files, folders)
    report(unread)
    readable = [file for file in files if file not in unread]
    gallery = place.gallery(readable, extractor.distance)
    if not gallery.paths:
        raise UserError('no image of the gallery can be read')
    if missing := len(readable) - len(gallery.paths):  # of another search, or --forget
        print(f'Left out: {missing} images that another program has just removed; search again', file=sys.stderr)
    unread = {}
    pictures, features = _features(extractor, pictures, unread)  # (Q, D)
    report(unread)
    if not pictures:
        raise UserError('no image of the query can be read')
    queries = [[picture] for picture in pictures]
    if args.fuse:
        if extractor.distance == 'cosine':  # which compares directions: no picture counts more than another
            features = F.normalize(features)
        queries, features = [[*pictures]], features.mean(0, keepdim=True)
    results = search(queries, features, gallery, args.k, extractor.distance, limit['threshold'] if limit else None)
    facts = {'weights': args.weights, **extractor.description, 'gallery': len(gallery.paths), 'limit': limit}
    if args.page:
        found.write(Path(args.page), results, facts, words_of(limit) if limit else '')
    if args.json:
        print(json.dumps({**facts, 'queries': results}, indent=2))
    else:
        show(results, limit)
        if args.page:
            print(f'Wrote {args.page}')


if __name__ == '__main__':
    commands.run(main)
