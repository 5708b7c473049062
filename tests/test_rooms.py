"""Which module may import which: the table of allowed imports, to which a new import must be added."""

import ast

import pytest
from conftest import ROOT

LONGEST, MOST_AT_ROOT = 350, 22  # lines of a room; files at the root
DOORS = ('models', 'readers', 'batches', 'files', 'extraction', 'runtime', 'page', 'toy')
# Each reader of a published data set has these: where it is, what it holds, what only training needs, its published
# counts, and the names of its images.
OF_READERS = ('FOLDERS', 'PARTS', 'TRAINING', 'PUBLISHED', 'NAME')
PUBLISHED_READERS = {f'readers.{name}' for name in ('cuhk03', 'market1501', 'mars', 'msmt17')}
EXPERIMENT = (  # what a script may import
    'arguments data_manager dataset_loader evaluation losses models runtime.checkpoint runtime.device '
    'runtime.launch runtime.meters samplers transforms weights'
)
MAY_IMPORT = {  # and each room, beside runtime.errors
    'arguments': 'data_manager models runtime.checks runtime.commands runtime.processes runtime.values',
    'data_manager': (
        'files.paths page.sheet readers.cuhk03 readers.faults readers.folder readers.joined readers.market1501 '
        'readers.market1501_500k readers.mars readers.msmt17 readers.split readers.table readers.tree '
        'runtime.commands runtime.cores runtime.values toy'
    ),
    'dataset_loader': 'arguments batches.caching batches.decoding batches.feed batches.workers runtime.device samplers',
    'eval_metrics': '',
    'evaluation': (
        'arguments data_manager dataset_loader eval_metrics files.features models.network page.cameras page.results '
        'page.runs ranking readers.tree runtime.device runtime.meters runtime.notices runtime.provenance '
        'runtime.ranks runtime.targets runtime.testset transforms'
    ),
    'export': (
        'extract extraction.agreement extraction.graph extraction.images extraction.onnx_network '
        'extraction.programs files.writing runtime.commands runtime.values'
    ),
    'extract': (
        'batches.workers dataset_loader evaluation extraction.engines extraction.images extraction.source '
        'files.draft files.paths models.network runtime.cards runtime.commands runtime.cpu runtime.device '
        'runtime.precision runtime.values transforms'
    ),
    'losses': '',
    'ranking': 'eval_metrics files.features reranking runtime.commands runtime.tiles runtime.values',
    'report': 'page page.activations runtime.commands runtime.values',
    'reranking': 'eval_metrics runtime.tiles',
    'samplers': 'batches.rounds transforms',
    'search': (
        'arguments batches.decoding data_manager evaluation extract extraction.images files.index files.paths '
        'page.found ranking runtime.commands runtime.notices runtime.testset runtime.values'
    ),
    'transforms': 'batches.resizing',
    'utils': 'files.writing runtime.console',
    'weights': (
        'files.download files.safetensors files.unpickling files.writing models models.layouts models.loading '
        'models.network runtime.commands runtime.values'
    ),
    'models': 'models.DenseNet models.MobileNet models.OSNet models.ResNet models.Timm models.network',
    'models.DenseNet': 'models.layouts models.network',
    'models.MobileNet': 'models.layouts models.network',
    'models.OSNet': 'models.layouts models.network',
    'models.ResNet': 'models.layouts models.network',
    'models.Timm': 'models.ResNet models.network',
    'models.layouts': 'transforms',
    'models.loading': 'models models.layouts models.network transforms',
    'models.network': 'batches.resizing models.layouts transforms',
    'readers': '',
    'readers.cuhk03': 'readers.market1501 readers.place readers.tree',
    'readers.faults': 'readers.pictures readers.tree',
    'readers.folder': 'batches.decoding readers.split readers.tree',
    'readers.joined': 'files.paths readers.tree',
    'readers.market1501': 'batches.decoding readers.place readers.tree',
    'readers.market1501_500k': 'readers.market1501 readers.place',
    'readers.mars': 'batches.decoding files.kinds readers.place readers.tree',
    'readers.msmt17': 'files.kinds readers.place readers.tree',
    'readers.pictures': 'batches.decoding',
    'readers.place': '',
    'readers.split': 'readers.tree',
    'readers.table': 'files.kinds files.writing readers.tree',
    'readers.tree': '',
    'batches': '',
    'batches.caching': 'batches.workers runtime.device',
    'batches.decoding': 'files.kinds',
    'batches.feed': 'batches.caching batches.workers',
    'batches.resizing': '',
    'batches.rounds': '',
    'batches.workers': 'runtime.memory runtime.signals runtime.system',
    'files': '',
    'files.download': 'models.network',
    'files.draft': 'files.paths files.writing runtime.system',
    'files.features': 'files.paths files.writing readers.tree runtime.device runtime.tiles',
    'files.index': 'files.paths runtime.tiles',
    'files.kinds': '',
    'files.paths': '',
    'files.safetensors': '',
    'files.unpickling': 'files.kinds',
    'files.writing': '',
    'extraction': '',
    'extraction.agreement': 'extraction.programs',
    'extraction.compiling': 'models.network',
    'extraction.engines': 'extraction.onnx_network extraction.programs models.network',
    'extraction.graph': 'models.network',
    'extraction.images': 'batches.decoding readers.tree',
    'extraction.onnx_network': 'batches.resizing data_manager files.kinds models.network runtime.tiles',
    'extraction.programs': 'extraction.graph extraction.onnx_network',
    'extraction.source': (
        'arguments batches.resizing extraction.compiling extraction.engines extraction.onnx_network models.Timm '
        'models.network runtime.device runtime.notices runtime.tiles weights'
    ),
    'runtime': '',
    'runtime.best_model': 'files.writing models.loading models.network runtime.device utils weights',
    'runtime.cards': '',
    'runtime.checkpoint': (
        'arguments data_manager models.layouts models.loading models.network page.results page.runs '
        'readers.tree runtime.best_model runtime.device runtime.meters runtime.notices runtime.provenance '
        'runtime.run_folder runtime.state utils weights'
    ),
    'runtime.checks': 'data_manager extraction.compiling files.kinds models runtime.processes',
    'runtime.commands': 'runtime.console runtime.memory',
    'runtime.console': '',
    'runtime.cores': '',
    'runtime.cpu': '',
    'runtime.device': (
        'arguments extraction.compiling files.writing models models.network runtime.cards runtime.cpu '
        'runtime.precision runtime.processes runtime.signals utils'
    ),
    'runtime.errors': '',
    'runtime.launch': (
        'arguments files.writing runtime.commands runtime.console runtime.device runtime.memory runtime.processes '
        'runtime.signals runtime.system utils'
    ),
    'runtime.memory': '',
    'runtime.meters': 'arguments eval_metrics files.writing page.runs runtime.device utils',
    'runtime.notices': 'arguments data_manager models.network readers.folder readers.tree runtime.device',
    'runtime.precision': '',
    'runtime.processes': 'runtime.cores',
    'runtime.provenance': 'runtime.device',
    'runtime.ranks': 'arguments ranking readers.tree runtime.device runtime.testset',
    'runtime.run_folder': (
        'files.writing page.results page.runs runtime.best_model runtime.device runtime.state utils weights'
    ),
    'runtime.signals': 'runtime.processes runtime.system',
    'runtime.state': 'arguments runtime.values',
    'runtime.system': 'runtime.commands',
    'runtime.targets': 'eval_metrics page.runs',
    'runtime.testset': 'arguments data_manager eval_metrics files.paths readers.tree runtime.device',
    'runtime.tiles': 'runtime.precision',
    'runtime.values': '',
    'page': 'files.writing page.cameras page.charts page.lists page.runs',
    'page.activations': 'dataset_loader extraction.source files.writing page.runs transforms',
    'page.cameras': 'eval_metrics page.runs',
    'page.charts': 'eval_metrics page.runs',
    'page.found': 'page page.lists',
    'page.lists': 'batches.decoding page.runs',
    'page.results': 'eval_metrics files.writing page ranking readers.tree utils',
    'page.runs': 'eval_metrics',
    'page.sheet': 'page page.lists readers.tree',
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
    """The modules that a module imports, including lazy imports and those for type checking."""
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


def defined(name) -> set[str]:
    """The public classes and constants, also aliases of types, that a room defines."""
    names = set()
    for node in ast.parse(FILES[name].read_text()).body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
    return {each for each in names if not each.startswith('_')}


def test_a_name_has_one_meaning():
    rooms_of: dict[str, set[str]] = {}
    for name in set(FILES) - SCRIPTS:
        for each in defined(name):
            rooms_of.setdefault(each, set()).add(name)
    several = {name: found for name, found in rooms_of.items() if len(found) > 1}
    assert {name for name in several if name not in OF_READERS} == set()
    # Elsewhere they would mean something else.
    assert all(found <= PUBLISHED_READERS for found in several.values())


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
