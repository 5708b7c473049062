"""The page of a search: each query with its nearest images."""

import datetime
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import page
from page.lists import thumbnail

QUERY_PICTURES = 8  # pictures shown of one query
MOST_QUERIES = 200  # shown; their pictures are part of the page


def write(path: Path, results: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], limit: str) -> Path:
    """Write the page, completely or not at all, and return its path.

    Args:
        results: for each query its files, whether it is unknown, and its nearest images.
        facts: facts about the model and the gallery.
        limit: the definition of a match, in words; '' without a threshold.

    Raises:
        UserError: it cannot be written.
    """
    picture, number = functools.cache(thumbnail), len(results)
    results = results[:MOST_QUERIES]
    root = os.path.dirname(
        os.path.commonpath([each['path'] for result in results for each in result['results']] or [''])
    )

    def shown(each: Mapping[str, Any]) -> dict[str, Any]:
        image = picture((each['path'],), 1)
        return {**each, 'image': image, 'name': each['path'], 'short': os.path.relpath(each['path'], root or '.')}

    queries = [
        {
            **result,
            'image': picture(tuple(result['query']), QUERY_PICTURES),
            'name': ', '.join(result['query']),
            'results': [shown(each) for each in result['results']],
        }
        for result in results
    ]
    decimals = 4 if facts['distance'] == 'cosine' else 2
    return page.render(
        path,
        'found.html.j2',
        title=f'Search in {facts["gallery"]} image{"" if facts["gallery"] == 1 else "s"}',
        date=datetime.datetime.now().astimezone().isoformat(' ', 'minutes'),
        queries=queries,
        number=number,
        facts=facts,
        limit=limit,
        decimals=decimals,
        missing=len(
            {
                os.path.abspath(each['name'])
                for query in queries
                for each in [query, *query['results']]
                if not each['image']
            }
        ),
        tracklets=False,
        runs=[None],
        charts=[],
    )
