"""The plan of the house: which room may import which. A new import is a decision, made here."""

import ast

import pytest
from conftest import ROOT

LONGEST, MOST_AT_ROOT = 350, 22  # lines of a room; files at the root
DOORS = ('models', 'readers', 'runtime', 'page', 'toy')
EXPERIMENT = (  # what a script may import
    'arguments data_manager dataset_loader evaluation losses models runtime.checkpoint runtime.device '
    'runtime.launch runtime.meters samplers transforms weights'
)
MAY_IMPORT = {  # and each room, beside runtime.errors
    'arguments': 'data_manager models runtime.checks runtime.commands runtime.processes runtime.values',
    'data_manager': (
        'page.sheet readers.cuhk03 readers.faults readers.folder readers.joined readers.market1501 '
        'readers.market1501_500k readers.mars readers.msmt17 readers.split readers.table readers.tree '
        'runtime.commands runtime.values toy'
    ),
    'dataset_loader': 'arguments runtime.caching runtime.decoding runtime.device runtime.feed runtime.workers samplers',
    'eval_metrics': '',
    'evaluation': (
        'arguments data_manager dataset_loader eval_metrics models.network page.cameras page.results page.runs '
        'ranking readers.tree runtime.device runtime.features runtime.meters runtime.notices runtime.provenance '
        'runtime.ranks runtime.targets runtime.testset transforms'
    ),
    'export': (
        'extract runtime runtime.agreement runtime.commands runtime.files runtime.graph runtime.images '
        'runtime.onnx_network runtime.programs runtime.values'
    ),
    'extract': (
        'dataset_loader evaluation runtime runtime.cards runtime.commands runtime.device runtime.draft runtime.engines '
        'runtime.images runtime.paths runtime.precision runtime.values runtime.workers transforms'
    ),
    'losses': '',
    'ranking': 'eval_metrics reranking runtime.commands runtime.features runtime.tiles runtime.values',
    'report': 'page page.activations runtime.commands runtime.values',
    'reranking': 'eval_metrics runtime.tiles',
    'samplers': 'transforms',
    'search': (
        'arguments data_manager evaluation extract page.found ranking runtime runtime.commands runtime.images '
        'runtime.index runtime.notices runtime.paths runtime.testset runtime.values'
    ),
    'transforms': '',
    'utils': 'runtime.console runtime.files',
    'weights': (
        'models models.layouts models.loading models.network runtime.commands runtime.download runtime.files '
        'runtime.safetensors runtime.unpickling runtime.values'
    ),
    'models': 'models.DenseNet models.MobileNet models.OSNet models.ResNet models.Timm models.network',
    'models.DenseNet': 'models.layouts models.network',
    'models.MobileNet': 'models.layouts models.network',
    'models.OSNet': 'models.layouts models.network',
    'models.ResNet': 'models.layouts models.network',
    'models.Timm': 'models.network',
    'models.layouts': 'transforms',
    'models.loading': 'models models.layouts models.network transforms',
    'models.network': 'models.layouts transforms',
    'page': 'page.cameras page.charts page.lists page.runs runtime.files',
    'page.activations': 'dataset_loader runtime.files runtime.notices transforms weights',
    'page.cameras': 'eval_metrics page.runs',
    'page.charts': 'eval_metrics page.runs',
    'page.found': 'page page.lists',
    'page.lists': 'page.runs',
    'page.results': 'eval_metrics page ranking readers.tree runtime.files utils',
    'page.runs': 'eval_metrics',
    'page.sheet': 'page page.lists readers.tree',
    'readers': '',
    'readers.cuhk03': 'readers.market1501 readers.place readers.tree',
    'readers.faults': 'readers readers.pictures readers.tree',
    'readers.folder': 'readers.split readers.tree runtime.decoding',
    'readers.joined': 'readers.tree',
    'readers.market1501': 'readers.place readers.tree runtime.decoding',
    'readers.market1501_500k': 'readers.market1501 readers.place',
    'readers.mars': 'readers.place readers.tree runtime.decoding runtime.kinds',
    'readers.msmt17': 'readers.place readers.tree runtime.kinds',
    'readers.pictures': 'runtime.decoding',
    'readers.place': '',
    'readers.split': 'readers.tree',
    'readers.table': 'readers.tree runtime.files runtime.kinds',
    'readers.tree': '',
    'runtime': '',
    'runtime.agreement': 'runtime.programs',
    'runtime.best_model': 'models.loading models.network runtime.device utils weights',
    'runtime.caching': 'runtime.device runtime.workers',
    'runtime.checkpoint': (
        'arguments data_manager models.layouts models.loading models.network page.results page.runs readers.tree '
        'runtime.best_model runtime.device runtime.files runtime.meters runtime.notices runtime.provenance '
        'runtime.run_folder runtime.state utils weights'
    ),
    'runtime.checks': 'data_manager models runtime runtime.compiling runtime.kinds runtime.processes',
    'runtime.cards': '',
    'runtime.compiling': 'models.network',
    'runtime.commands': 'runtime.console runtime.memory',
    'runtime.console': '',
    'runtime.decoding': 'runtime.kinds',
    'runtime.device': (
        'arguments models models.network runtime.cards runtime.compiling runtime.files runtime.precision '
        'runtime.processes runtime.signals utils'
    ),
    'runtime.download': 'models.network',
    'runtime.engines': (
        'arguments models.Timm models.network runtime runtime.compiling runtime.device runtime.notices '
        'runtime.onnx_network runtime.tiles transforms weights'
    ),
    'runtime.errors': '',
    'runtime.draft': 'runtime.files runtime.paths runtime.system',
    'runtime.features': 'readers.tree runtime.device runtime.files runtime.paths',
    'runtime.feed': 'runtime.caching runtime.workers',
    'runtime.files': '',
    'runtime.graph': 'models.network',
    'runtime.images': 'readers.tree runtime.decoding',
    'runtime.index': 'runtime.tiles',
    'runtime.kinds': '',
    'runtime.launch': (
        'arguments runtime.commands runtime.console runtime.device runtime.files runtime.memory runtime.processes '
        'runtime.signals runtime.system utils'
    ),
    'runtime.memory': '',
    'runtime.meters': 'arguments eval_metrics page.runs runtime.device runtime.files utils',
    'runtime.notices': 'arguments data_manager models.network readers.tree runtime.device',
    'runtime.paths': '',
    'runtime.onnx_network': 'data_manager models.network transforms',
    'runtime.precision': '',
    'runtime.processes': '',
    'runtime.programs': 'runtime.graph runtime.onnx_network',
    'runtime.provenance': 'runtime.device',
    'runtime.ranks': 'arguments ranking readers.tree runtime.device runtime.testset',
    'runtime.run_folder': 'page.results page.runs runtime.best_model utils',
    'runtime.signals': 'runtime.processes runtime.system',
    'runtime.safetensors': '',
    'runtime.state': 'arguments',
    'runtime.system': 'runtime.commands',
    'runtime.targets': 'eval_metrics page.runs',
    'runtime.testset': 'arguments data_manager eval_metrics readers.tree runtime.device runtime.paths',
    'runtime.tiles': 'runtime.precision',
    'runtime.unpickling': 'runtime.kinds',
    'runtime.values': '',
    'runtime.workers': 'runtime.memory runtime.signals runtime.system',
    'toy': 'toy.formats',
    'toy.formats': 'toy.people toy.scenes toy.views',
    'toy.people': 'toy.views',
    'toy.scenes': 'toy.people toy.views',
    'toy.views': '',
}


def rooms():
    for path in [*ROOT.glob('*.py'), *(path for door in DOORS for path in (ROOT / door).glob('*.py'))]:
        name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
        yield name.removesuffix('.__init__'), path


FILES = dict(rooms())
SCRIPTS = {name for name in FILES if name.startswith('train_')}


def imports(name) -> set[str]:
    """The rooms that a room imports, lazily or for a type alone or not."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {f'{node.module}.{alias.name}' for alias in node.names}
            found |= whole & set(FILES) or {node.module}
    return found & set(FILES) - {name}


def test_every_room_is_on_the_plan():
    assert set(FILES) - SCRIPTS == set(MAY_IMPORT)


@pytest.mark.parametrize('room', sorted(FILES))
def test_a_room_imports_what_the_plan_allows(room):
    allowed = EXPERIMENT if room in SCRIPTS else MAY_IMPORT[room]
    assert imports(room) <= {*allowed.split(), 'runtime.errors'}


def test_no_room_is_reached_from_itself():
    left = {name: imports(name) for name in FILES}
    while ground := {name for name, needed in left.items() if not needed}:
        left = {name: needed - ground for name, needed in left.items() if name not in ground}
    assert not left, f'circle among {left}'


def test_only_two_rooms_know_of_process_groups():
    knowing = {name for name, path in FILES.items() if 'torch.distributed' in path.read_text()}
    assert knowing == {'runtime.processes', 'runtime.device'}


def test_rooms_are_short():
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_the_root_can_be_taken_in_at_a_glance():
    assert len(list(ROOT.glob('*.py'))) <= MOST_AT_ROOT


@pytest.mark.parametrize('script', sorted(SCRIPTS))
def test_a_script_is_imported_by_none_and_is_short(script):
    assert not [name for name in FILES if script in imports(name)]
    assert len(FILES[script].read_text().splitlines()) <= 100


def test_utils_is_no_drawer():
    assert len(FILES['utils'].read_text().splitlines()) <= 100
