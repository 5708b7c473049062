"""Networks that torch compiles for a CPU, and a check of what the compiler needs."""

import contextlib
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn

from models.network import Network, Replacement
from runtime.errors import UserError, plain


class Sized(nn.Module):
    """A network for images of one size, which the compiler treats as constant; only the batch size is dynamic."""

    def __init__(self, network: Network, height: int, width: int):
        super().__init__()
        self.network, self.size = network.eval(), (3, height, width)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.size:
            raise ValueError(f'images of {tuple(x.shape[1:])}, not {self.size}')
        features: Tensor = self.network(x)
        return features


class Compiled(Replacement):
    """A network in eval mode, compiled when it is first called: (B, 3, height, width) -> (B, feat_dim).

    Its weights become constants of the code, with BatchNorm folded into convolutions whose weights are stored in the
    order that the CPU's kernels read. Later changes to the weights have no effect. The network is compiled once for all
    batches of two or more images. A single image is duplicated to a batch of two, which avoids compiling code for
    single images, unless `batch`, the largest batch size, is 1.

    Call it under `torch.inference_mode` or `torch.no_grad`: otherwise the weights do not become constants.

    Raises:
        UserError: the compiler fails.
    """

    def __init__(self, network: Network, height: int, width: int, batch: int):
        super().__init__(network)
        options: dict[str, Any] = {'freezing': True}
        if skip := getattr(torch.compiler, 'skip_guard_on_all_nn_modules_unsafe', None):  # torch 2.8 and newer
            options['guard_filter_fn'] = skip  # otherwise each call checks whether any module has changed
        self.compiled = torch.compile(Sized(network, height, width), dynamic=True, options=options)
        self.batch, self.single, self.works = batch, False, False
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.single = self.single or (self.batch == len(x) == 1 and not self.works)
        if len(x) == 1 and not self.single:
            return self.forward(torch.cat((x, x)))[:1]
        # The option alone is not enough: torch also reads this private setting before it treats weights as constants.
        frozen = contextlib.nullcontext() if self.works else torch._inductor.config.patch(freezing=True)
        try:
            with frozen:
                features: Tensor = self.compiled(x)
        except Exception as problem:
            if self.works or isinstance(problem, MemoryError):
                raise
            reason = plain(str(problem)) or type(problem).__name__
            raise UserError(f'--compile: the network cannot be compiled ({reason}); remove it') from problem
        self.works = True
        return features


# Language, environment variable, usual programs, and the environment variables of folders of header files
CPP = 'C++', 'CXX', ('clang++' if sys.platform == 'darwin' else 'g++',), ('CPATH', 'CPLUS_INCLUDE_PATH')  # for torch
C = 'C', 'CC', ('gcc', 'clang'), ('CPATH', 'C_INCLUDE_PATH')  # for triton, which compiles its launcher


def check_compiler(language: str, variable: str, usual: tuple[str, ...], folders: tuple[str, ...]) -> None:
    """Raise UserError, a line about --compile, unless a compiler and Python's header files are found."""
    compiler = os.environ.get(variable)  # used as it is
    if compiler is not None and not shutil.which(compiler):
        raise UserError(
            f'--compile needs a {language} compiler, and {variable} is {compiler!r} in the environment, which was not '
            f'found: set it to the path of one, or remove --compile'
        )
    if compiler is None and not any(map(shutil.which, usual)):
        raise UserError(
            f'--compile needs a {language} compiler, and there is no {" or ".join(usual)}: install one, set {variable} '
            f'in the environment to the path of another, or remove --compile'
        )
    check_headers(folders)


def check_headers(variables: tuple[str, ...]) -> None:
    """Raise UserError unless Python.h is in one of the folders of `include_folders`."""
    folders = include_folders(variables)
    if not any((folder / 'Python.h').is_file() for folder in folders):
        version = '.'.join(map(str, sys.version_info[:2]))
        raise UserError(
            f"--compile needs Python's header files, and there is no {folders[0] / 'Python.h'}: install them (on "
            f'Debian and Ubuntu the package python{version}-dev), or remove --compile'
        )


def include_folders(variables: tuple[str, ...]) -> list[Path]:
    """The folders in which a compiler looks for Python.h: Python's own, then those in these environment variables."""
    scheme = sysconfig.get_default_scheme()
    installed = sysconfig.get_paths('posix_prefix' if scheme == 'posix_local' else scheme)['include']  # as triton does
    more = [os.environ.get(name, '') for name in variables]
    return [Path(folder) for folder in (installed, *os.pathsep.join(more).split(os.pathsep)) if folder]
