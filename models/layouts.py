"""The layouts of weight files: how each project names its tensors, what its files do not record, and how it tests.

A network's class lists the layouts in which it is published (`Network.published`). Names and shapes do not show
strides, pools and activations, so each row follows the source code of its project at the release given.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from transforms import IMAGENET

Names = tuple[tuple[str, str], ...]  # regular expressions and their replacements, applied to a name one after another

# What files of a layout do not record, and the possible values. `last_stride`, `pooling` and `neck_feature` are
# arguments of `models.init_model`; `project` selects the layout; the others are properties of weights, which are saved
# with them as buffers (FLAGS).
ASSUMPTIONS: dict[str, tuple[str, ...]] = {
    'project': ('reid-strong-baseline', 'timm'),
    'last_stride': ('1', '2'),
    'pooling': ('avg', 'max', 'gem'),
    'neck_feature': ('after', 'before'),
    'stem_pool': ('padded', 'ceil'),
    'transition_stride': ('2', '1'),
}
FLAGS = {
    ('stem_pool', 'ceil'): 'stem_ceil',
    ('transition_stride', '1'): 'last_pool_overlaps',
}  # (assumption, value) -> the buffer that is set
OF_WEIGHTS = {'project', *(name for name, _ in FLAGS)}  # the assumptions that are not arguments of a network


@dataclass(frozen=True)
class Layout:
    """The files of a project.

    note:    the project and what was changed, for messages
    names:   replacements that turn its names into those of this project
    marks:   patterns, each of which matches a name in every file of this layout
    lacks:   patterns that match no name in a file of this layout
    unused:  pattern of the names of tensors that the project's test does not use, which are left out; '' for none
    sets:    the buffers of `Network.variants` that its networks need
    adapt:   removes from the renamed weights what is an option of a test, and returns these options
    made:    arguments of `models.init_model` that the project's networks always have, besides those seen in the names
    assumed: what its files do not record: a name of ASSUMPTIONS -> the value in the project's published configuration
    test:    options of the project's test; empty if its weights are not trained for re-ID
    """

    note: str
    names: Names = ()
    marks: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    unused: str = ''
    sets: tuple[str, ...] = ()
    adapt: Callable[[dict[str, Tensor]], Mapping[str, Any]] = lambda _: {}
    made: Mapping[str, Any] = field(default_factory=dict)
    assumed: Mapping[str, str] = field(default_factory=dict)
    test: Mapping[str, Any] = field(default_factory=dict)


def tested(
    distance: str = 'euclidean', interpolation: str = 'bilinear', height: int = 256, flip_test: bool = False
) -> dict[str, Any]:
    """Options of a test with images 128 pixels wide."""
    return {
        'height': height, 'width': 128, 'interpolation': interpolation, 'distance': distance, 'flip_test': flip_test
    }  # fmt: skip


# This project's own weights without the entry `model` of its checkpoints; networks with a neck have last stride 1
OWN_WITH_NECK = Layout("this project's", assumed={'last_stride': '1'})

# The weights of `-a timm:NAME` without the entry `arguments` of a checkpoint. timm's plain ResNets have the same names
# and shapes as those of reid-strong-baseline, which have one ReLU less.
OF_TIMM = Layout("this project's, of a network of timm, which -a timm:NAME names")

# ResNets. All projects except the original use torchvision's names, many with a prefix.

RESNET: Names = (
    (r'^conv1\.', 'base.0.'),
    (r'^bn1\.', 'base.1.'),
    *((rf'^layer{stage}\.', f'base.{stage + 3}.') for stage in (1, 2, 3, 4)),
)
EMBEDDING: Names = ((r'^fc\.([01])\.', r'embedding.\1.'),)  # torchreid's *_fc512

TORCHVISION = Layout(
    "torchvision's names translated",
    (*RESNET, (r'^fc\.(weight|bias)$', r'classifier.\1')),
    marks=(r'^conv1\.weight$',),
    lacks=(r'^classifier\.', r'^fc\.\d'),
)
# torchreid, deep-person-reid v1.4.0 (also v0.5.0 to v1.0.6): no neck, Euclidean distance, and last stride 2, except for
# resnet50_fc512
TORCHREID = Layout(
    "torchreid's names translated",
    RESNET,
    marks=(r'^conv1\.weight$', r'^classifier\.'),
    lacks=(r'^fc\.',),
    made={'last_stride': 2},
    test=tested(),
)
TORCHREID_FC512 = Layout(
    "torchreid's names translated, its fc is the embedding here",
    (*RESNET, *EMBEDDING),
    marks=(r'^conv1\.weight$', r'^fc\.0\.weight$'),
    made={'last_stride': 1},
    test=tested(),
)


# reid-strong-baseline, April 2020 (unchanged since March 2019): its ResNets have no ReLU after the stem's bn1, but its
# ResNet50-IBN-a does, and also has an unused `fc`. The published configurations test with 256x128.
STRONG: dict[str, Any] = {
    'names': ((r'^base\.', ''), *RESNET),
    'marks': (r'^base\.conv1\.weight$',),
    'assumed': {'last_stride': '1', 'neck_feature': 'after'},
    'test': tested('cosine'),
}
STRONG_BASELINE = Layout(
    "reid-strong-baseline's names translated, stem_linear set: no ReLU behind the first normalisation",
    sets=('stem_linear',),
    **STRONG | {'assumed': {'project': 'reid-strong-baseline', **STRONG['assumed']}},
)
STRONG_BASELINE_IBN = Layout("reid-strong-baseline's names translated", unused=r'^base\.fc\.', **STRONG)


def own_normalisation(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """Mean and standard deviation of pixels in 0..255, saved by releases before 1.3; {} if they are ImageNet's."""
    pair = [state_dict.pop(name, torch.tensor([])) for name in ('pixel_mean', 'pixel_std')]
    if not all(each.numel() == 3 and each.is_floating_point() for each in pair):
        return {}
    mean, std = (tuple(round(value / 255, 6) for value in each.flatten().tolist()) for each in pair)
    return {} if (mean, std) == IMAGENET else {'normalisation': (mean, std)}


FASTREID_NAMES: Names = (
    (r'^backbone\.NL_(\d)\.', r'non_local.\1.'),
    (r'^backbone\.', ''),
    *RESNET,
    (r'^heads\.pool_layer\.p$', 'pool.p'),
    (r'^heads\.(?:bnneck|bottleneck\.0)\.', 'bottleneck.'),
    (r'^heads\.(?:classifier\.)?weight$', 'classifier.weight'),
)
EXPONENT, ATTENTION = r'^heads\.pool_layer\.p$', r'^backbone\.NL_'


def fastreid(kind: str, *marks: str, lacks: tuple[str, ...] = (), height: int = 256, **assumed: str) -> Layout:
    return Layout(
        f"fast-reid's names translated ({kind})",
        FASTREID_NAMES,
        marks=(r'^backbone\.conv1\.weight$', *marks),
        lacks=lacks,
        adapt=own_normalisation,
        assumed={'last_stride': '1', 'neck_feature': 'after', **assumed},
        test=tested('cosine', 'bicubic', height),
    )


# fast-reid: v0.1 and v0.1.1 (May and July 2020) have heads.bnneck, a padded pool in the stem, and in both AGW and SBS a
# GeM with a learned exponent, so that their files look the same; SBS is tested at 384x128. v1.0.0 and v1.3.0 have
# heads.bottleneck.0, a pool without padding in ceil_mode, and in AGW a GeM with the fixed exponent 3. All test the
# feature behind the neck, with cosine distance and bicubic resizing.
EARLY = r'^heads\.bnneck\.weight$'
LATE = r'^heads\.bottleneck\.0\.weight$'
FASTREID = (
    fastreid('v0.1, average pooling', EARLY, lacks=(EXPONENT,), stem_pool='padded', pooling='avg'),
    fastreid('v0.1, GeM: AGW at 256x128; for SBS give --height 384', EARLY, EXPONENT, stem_pool='padded'),
    fastreid('v1, bagtricks', LATE, lacks=(EXPONENT, ATTENTION), stem_pool='ceil', pooling='avg'),
    fastreid('v1, AGW', LATE, ATTENTION, lacks=(EXPONENT,), stem_pool='ceil', pooling='gem'),
    fastreid('v1, SBS', LATE, EXPONENT, stem_pool='ceil', height=384),
)


# Person_reID_baseline_pytorch, v1.1.0 of May 2025 (unchanged since v1.0.1 of December 2021): the feature is the output
# of a linear layer and batch normalisation, without a ReLU; features of mirror images are added. Earlier releases,
# whose files look the same, may have had a LeakyReLU there.
FT_NET: dict[str, Any] = {
    'marks': (r'^model\.', r'^classifier\.add_block\.0\.weight$'),
    'sets': ('embedding_linear',),
    'test': tested('cosine', 'bicubic', flip_test=True),
}
FT_NET_HEAD: Names = (
    (r'^classifier\.add_block\.([01])\.', r'embedding.\1.'),
    (r'^classifier\.classifier\.0\.', 'classifier.'),
)
FT_NET_RESNET = Layout(
    "Person_reID_baseline_pytorch's ft_net translated, embedding_linear set: no ReLU behind the embedding",
    ((r'^model\.', ''), *RESNET, *FT_NET_HEAD),
    unused=r'^model\.fc\.',
    assumed={'last_stride': '2'},
    **FT_NET,
)
FT_NET_DENSE = Layout(
    "Person_reID_baseline_pytorch's ft_net_dense translated, embedding_linear set: no ReLU behind the embedding",
    ((r'^model\.features\.', 'base.'), *FT_NET_HEAD),
    unused=r'^model\.classifier\.',
    made={'last_stride': 2},
    assumed={'transition_stride': '2'},
    **FT_NET,
)

# Pre-training with MoCo, and LUPerson's with the same program: the query encoder, without its projection
MOCO = Layout(
    "MoCo's query encoder, not trained with identities, its names translated",
    ((r'^encoder_q\.', ''), *RESNET),
    marks=(r'^encoder_q\.conv1\.weight$',),
    unused=r'^(?:encoder_q\.fc\.|encoder_k\.|queue$|queue_ptr$)',
)

RESNETS = (TORCHVISION, TORCHREID, TORCHREID_FC512, STRONG_BASELINE, *FASTREID, FT_NET_RESNET, MOCO)
RESNETS_IBN = (TORCHVISION, TORCHREID, STRONG_BASELINE_IBN, *FASTREID, FT_NET_RESNET)


def written(test: Mapping[str, Any]) -> str:
    """Options of a test in the form of a command line."""
    words = []
    for name, value in test.items():
        flag = f'--{name.replace("_", "-")}'
        words.append((flag if value else f'no {flag}') if isinstance(value, bool) else f'{flag} {value}')
    return ' '.join(words)


def chosen(assume: str) -> dict[str, str]:
    """Parse NAME=VALUE, separated by commas."""
    pairs = [pair.partition('=') for pair in assume.split(',') if pair.strip()]
    return {name.strip(): value.strip() for name, _, value in pairs}


def in_training(assumed: Sequence[str]) -> list[str]:
    """The assumptions NAME=VALUE that matter when training starts from the weights."""
    return [each for each in assumed if each.partition('=')[0] in OF_WEIGHTS]


def made_of(recorded: Any) -> dict[str, Any]:
    """The arguments of `models.assemble` that a file of this project records and that its names do not show."""
    choices = {'last_stride': (1, 2), 'pooling': ASSUMPTIONS['pooling'], 'neck_feature': ASSUMPTIONS['neck_feature']}
    recorded = recorded if isinstance(recorded, dict) else {}
    return {
        name: value for name, value in recorded.items() if type(value) in (int, str) and value in choices.get(name, ())
    }


def test_of(recorded: Any) -> dict[str, Any]:
    """The valid test options recorded in a converted file."""
    recorded = recorded if isinstance(recorded, dict) else {}
    choices: dict[str, Container] = {
        'height': range(1, 10_000), 'width': range(1, 10_000), 'interpolation': ('bilinear', 'bicubic'),
        'distance': ('euclidean', 'cosine'), 'flip_test': (False, True),
    }  # fmt: skip
    test = {
        name: value
        for name, value in ((name, recorded.get(name)) for name in choices)
        if type(value) is type(tested()[name]) and value in choices[name]
    }
    pair = recorded.get('normalisation')
    triples = [each for each in pair if isinstance(each, list | tuple)] if isinstance(pair, list | tuple) else []
    numbers = [number for triple in triples for number in triple]
    if [len(each) for each in triples] == [3, 3] and all(type(number) is float for number in numbers):
        test['normalisation'] = tuple(map(tuple, triples))
    return test
