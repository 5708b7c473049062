"""Images per second of each backbone, in bf16 beside float32: rows of `table.py`, measured with BENCH=full.

The steps are those of training.py, on a resident batch of 32 images of 256x128. The training rows are the ground of
`faster_in_bf16`, by which --precision auto chooses on CPUs: their target is what the backbone's class says, on a CPU
that is faster in bf16 at all. Where OpenVINO is installed, a further row has the extraction by it.
"""

import importlib.util
from collections.abc import Iterator

import torch

import models
from extraction.engines import ENGINES
from runtime.precision import has_bf16
from table import Row, row
from training import BATCH, compare

SURE = 0.05  # a backbone whose two speeds differ by less than this fraction may say either


def rows(full: bool, names: list[str] | None = None) -> Iterator[Row]:
    """`names`: the backbones, all by default."""
    if not full:
        yield Row('backbones in bf16 and fp32: measured with BENCH=full')
        return
    on_cpu = not torch.cuda.is_available()
    held = on_cpu and has_bf16(torch.device('cpu'))
    engine = on_cpu and all(map(importlib.util.find_spec, ENGINES['openvino']))
    for arch in names or models.get_names():
        gains = models.network_of(arch).faster_in_bf16
        for what, maker, args in (('training step', 'trainer', (False, arch)), ('extraction', 'extractor', (arch,))):
            sides: dict[str, tuple] = {'ours': (maker, 'bf16', *args), 'plain': (maker, 'fp32', *args)}
            measured = row(f'{arch}, {what}, bf16; plain: fp32', compare(1, **sides), BATCH)
            if maker == 'trainer' and held:
                assert measured.times_plain is not None
                measured.target = f'plain {f"≥ {1 - SURE}" if gains else f"≤ {1 + SURE}"}'
                measured.met = measured.times_plain >= 1 - SURE if gains else measured.times_plain <= 1 + SURE
            yield measured
        if engine:
            sides = {'ours': ('extractor', 'fp32', arch, 'openvino'), 'plain': ('extractor', 'fp32', arch)}
            yield row(f'{arch}, extraction, fp32, --engine openvino; plain: torch', compare(1, **sides), BATCH)
