"""Which images make a batch, and the random draws that go with each.

Every random number of an epoch is a function of (seed, epoch, position in the epoch): workers draw nothing, and no
generator has a state that must be saved. Runs with any number of workers or processes, and runs resumed in the middle
of an epoch, see the same batches and the same augmentation.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from runtime.errors import UserError
from transforms import DRAWS_OF_ERASING

ORDER, INSTANCES, AUGMENTATION, ITEMS, ERASING = range(5)  # independent streams of random numbers
COLUMNS = {AUGMENTATION: 4, ERASING: DRAWS_OF_ERASING}  # of `draws`: translate?, down, right, mirror?; see `erased`
DRAWS = sum(COLUMNS.values())


def generator(stream: int, seed: int, epoch: int, *position: int) -> np.random.Generator:
    """The random numbers of one `stream` in an epoch (>= 0), or of one position in it; `seed` is any integer."""
    return np.random.default_rng((stream, epoch, int(seed < 0), abs(seed), *position))


class EpochSampler(Sampler):
    """What both samplers share: an epoch is a list of indices, cut into full batches; a remainder is left out.

    This project's loader uses `draw(epoch)`. Iterating, after `set_epoch`, yields single indices including the
    remainder, so that `DataLoader(dataset, batch_size, sampler=sampler, drop_last=True)` makes the same batches.
    """

    def __init__(self, data_source: Sequence, batch_size: int | None, seed: int):
        self.data_source, self.seed, self.epoch = data_source, seed, 0
        self.batch_size: int = batch_size  # type: ignore[assignment]  # None: `draw` must not be called
        if batch_size is not None and batch_size < 1:
            raise UserError(f'--train-batch is {batch_size}: a batch needs at least 1 image')

    def __len__(self) -> int:
        raise NotImplementedError

    def order(self, epoch: int) -> np.ndarray:
        """The indices of the epoch, in order: int64 (len(self),)."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch).tolist())

    @property
    def num_batches(self) -> int:
        """The number of full batches in an epoch."""
        return len(self) // self.batch_size

    def draw(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The batches of an epoch: indices int64 (num_batches, B) and draws float64 (num_batches, B, DRAWS).

        The draws of an image are uniform in [0, 1), see `TrainTransform`. They depend only on (seed, epoch, position),
        where the position counts through the epoch, batch by batch.
        """
        shape = self.num_batches, self.batch_size
        used = self.num_batches * self.batch_size
        indices = self.order(epoch)[:used]  # (used,)
        draws = np.concatenate(  # (used, DRAWS); each stream row by row, so that more positions change none before them
            [generator(stream, self.seed, epoch).random((used, columns)) for stream, columns in COLUMNS.items()], axis=1
        )
        return torch.from_numpy(indices).view(shape), torch.from_numpy(draws).view(*shape, DRAWS)


class RandomSampler(EpochSampler):
    """Every image once per epoch, in random order, in batches of `batch_size`; the remainder of an epoch is left out.

    Args:
        data_source: list of (anything, pid, camid).

    Raises:
        UserError: the data do not fill a batch.
    """

    def __init__(self, data_source: Sequence, batch_size: int, seed: int = 0):
        super().__init__(data_source, batch_size, seed)
        count = len(data_source)
        if count == 0:
            raise UserError('the training set is empty: check --data-dir')
        if count < batch_size:
            raise UserError(
                f'--train-batch is {batch_size}, but the training set has only {count} images: '
                f'use --train-batch {count} or less'
            )

    def __len__(self) -> int:
        return len(self.data_source)

    def order(self, epoch: int) -> np.ndarray:
        return generator(ORDER, self.seed, epoch).permutation(len(self.data_source))


class RandomIdentitySampler(EpochSampler):
    """Every identity once per epoch, with K consecutive images: batches of P identities with K images each.

    Hermans, Beyer, Leibe. In Defense of the Triplet Loss for Person Re-Identification. arXiv:1703.07737.

    The K images of an identity are drawn without replacement, or with replacement if it has fewer than K. P is
    batch_size / K; identities that do not fill a last batch are left out of that epoch.

    Args:
        data_source: list of (anything, pid, camid).
        num_instances: K.
        batch_size: P * K, over all processes; needed for `draw`, not for iterating.

    Raises:
        UserError: no triplet can be formed: K or P is less than 2, K does not divide the batch, or the data have fewer
            than P identities or only one image of each. The message says what to change.
    """

    def __init__(self, data_source: Sequence, num_instances: int = 4, batch_size: int | None = None, seed: int = 0):
        super().__init__(data_source, batch_size, seed)
        self.num_instances = num_instances
        pids = np.array([pid for _, pid, _ in data_source], dtype=np.int64)  # (N,)
        by_pid = np.argsort(pids, kind='stable')  # (N,)
        self.pids, starts = np.unique(pids[by_pid], return_index=True)  # (identities,) both
        self.images = np.split(by_pid, starts[1:])  # for each identity the indices of its images
        self._check()

    def _check(self) -> None:
        k, batch, identities = self.num_instances, self.batch_size, len(self.pids)
        if k < 2:
            raise UserError(f'--num-instances is {k}: a triplet needs at least 2 images of an identity in a batch')
        if identities < 2:
            raise UserError(f'the training set has {identities} identities, but a triplet needs 2: check --data-dir')
        if identities == len(self.data_source):
            raise UserError(
                f'each of the {identities} identities in the training set has only one image, so no triplet has a '
                'positive: add images, or train with an xent script'
            )
        if batch is None:
            return
        largest = identities * k
        if batch % k:
            below, above = max(batch // k, 2) * k, max(batch // k + 1, 2) * k
            sizes = ' or '.join(str(size) for size in sorted({below, above}) if size <= largest) or str(largest)
            raise UserError(f'--num-instances {k} does not divide --train-batch {batch}: use --train-batch {sizes}')
        if batch < 2 * k:
            raise UserError(
                f'--train-batch {batch} has room for one identity with --num-instances {k}, but a triplet needs 2: '
                f'use --train-batch {2 * k} or more'
            )
        if batch > largest:
            raise UserError(
                f'--train-batch {batch} needs {batch // k} identities with --num-instances {k}, but the training set '
                f'has only {identities}: use --train-batch {largest} or less'
            )

    def __len__(self) -> int:
        return len(self.pids) * self.num_instances

    def order(self, epoch: int) -> np.ndarray:
        k, instances = self.num_instances, generator(INSTANCES, self.seed, epoch)
        chosen = np.stack([instances.choice(own, k, replace=len(own) < k) for own in self.images])  # (identities, K)
        return chosen[generator(ORDER, self.seed, epoch).permutation(len(chosen))].ravel()  # (identities * K,)


class AllImagesSampler(RandomIdentitySampler):
    """Every image once per epoch, in batches of P identities with K images each.

    The images of an identity are shuffled and cut into groups of K; other images of it, drawn at random, fill the last
    group. Groups are dealt to the batches so that the P identities of a batch are distinct. Which groups meet, and
    their order, is random. Left out of an epoch are: groups that do not fill a last batch, and groups of an identity
    that has more of them than there are batches.

    Reid baselines since Luo et al., CVPRW 2019, arXiv:1903.07071, draw such batches one after the other, until fewer
    than P identities are left; an epoch is then shorter by a number of batches that varies.

    Arguments and errors as for RandomIdentitySampler.
    """

    def __init__(self, data_source: Sequence, num_instances: int = 4, batch_size: int = 64, seed: int = 0):
        super().__init__(data_source, num_instances, batch_size, seed)
        per_batch = batch_size // num_instances  # P
        groups = np.array([-(-len(own) // num_instances) for own in self.images])  # (identities,)
        batches = groups.sum() // per_batch
        while batches > (possible := np.minimum(groups, batches).sum() // per_batch):
            batches = possible
        self.groups, self.batches = np.minimum(groups, batches), int(batches)

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        k, instances, order = (
            self.num_instances,
            generator(INSTANCES, self.seed, epoch),
            generator(ORDER, self.seed, epoch),
        )
        dealt = []  # all groups, those of an identity one after the other
        for identity in order.permutation(len(self.images)):
            own = instances.permutation(self.images[identity])
            missing = -len(own) % k
            others = own[: len(own) - len(own) % k] if len(own) >= k else own  # none of the last group, if possible
            more = instances.choice(others, missing, replace=len(own) < k)
            dealt.append(np.concatenate([own, more]).reshape(-1, k)[: self.groups[identity]])  # (groups, K)
        groups = np.concatenate(dealt)  # (G, K)
        surplus = len(groups) - self.batches * (self.batch_size // k)
        groups = np.delete(groups, order.choice(len(groups), surplus, replace=False), axis=0)
        batches = groups.reshape(-1, self.batches, k).transpose(1, 0, 2)  # (batches, P, K), as cards are dealt
        return order.permutation(batches).ravel()
