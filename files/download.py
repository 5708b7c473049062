"""Published weights of a backbone, from the cache of torch.hub or downloaded into it."""

import http.client
import os
import socket
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.network import WeightsFile
from runtime.errors import UserError, plain

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

STALLED_SECONDS = 30  # seconds without data before a download is abandoned


def fetch(imagenet: 'WeightsEnum | WeightsFile', timeout: float = STALLED_SECONDS) -> dict[str, Tensor]:
    """The weights of a backbone under their published names.

    timeout: seconds without data before a download is abandoned

    Raises:
        UserError: the weights cannot be downloaded, or the file in the cache is damaged.
    """
    path = os.path.join(torch.hub.get_dir(), 'checkpoints', os.path.basename(imagenet.url))
    elsewise = 'use another file with --pretrained PATH, or start from random weights with --pretrained none'
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)  # torch.hub would wait forever
    try:
        state_dict: dict[str, Tensor] = imagenet.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, weights_only=True, map_location='cpu'
        )
        return state_dict
    except UserError:
        raise
    except Exception as error:
        network = isinstance(error, OSError | http.client.HTTPException)
        if network or not os.path.exists(path):  # no file: the download was incomplete or altered
            reason = plain(str(getattr(error, 'reason', error)) or type(error).__name__)
            raise UserError(
                f'the ImageNet weights could not be downloaded ({reason}); download {imagenet.url} into '
                f'{os.path.dirname(path)} yourself, {elsewise}'
            ) from error
        reason = plain(f'{type(error).__name__}: {error}')
        raise UserError(f'{path} is damaged ({reason}); delete it and start again, {elsewise}') from error
    finally:
        socket.setdefaulttimeout(before)
