"""Selects the images of each batch, and draws the random numbers for each image.

Every random number of an epoch is a function of (seed, epoch, position in the epoch): workers draw nothing, and no
generator has a state to be saved. Runs with any number of workers or processes, and runs resumed in the middle of an
epoch, get the same batches and the same augmentation.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from batches.rounds import balanced_order, repeated, split_by
from runtime.errors import UserError
from transforms import DRAWS_OF_ERASING

ORDER, INSTANCES, AUGMENTATION, ITEMS, ERASING, STEPS = range(6)  # independent streams of random numbers
Groups = Sequence[int] | np.ndarray | None  # (N,), the group of each item, such as its data set or camera
WIDTHS = {AUGMENTATION: 4, ERASING: DRAWS_OF_ERASING}  # of `draws`: translate?, down, right, mirror?; see `erased`
DRAWS = sum(WIDTHS.values())


def generator(stream: int, seed: int, epoch: int, *position: int) -> np.random.Generator:
    """The random numbers of one `stream` in an epoch (>= 0), or of one position in it; `seed` is any integer."""
    return np.random.default_rng((stream, epoch, int(seed < 0), abs(seed), *position))


class EpochSampler(Sampler):
    """Base class of the samplers: an epoch is a list of indices, cut into full batches; a remainder is left out.

    This project's loader uses `draw(epoch)`. Iterating, after `set_epoch`, yields single indices including the
    remainder, so that `DataLoader(dataset, batch_size, sampler=sampler, drop_last=True)` makes the same batches.
    """

    groups: np.ndarray | None = None  # also of a subclass that has an `__init__` of its own

    def __init__(self, data_source: Sequence, batch_size: int | None, seed: int, groups: Groups = None):
        if groups is not None and len(groups) != len(data_source):
            raise ValueError(f'there are groups of {len(groups)} items, but {len(data_source)} items')
        self.data_source, self.seed, self.epoch = data_source, seed, 0
        self.groups = None if groups is None else np.asarray(groups)
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
        draws = np.concatenate(  # (used, DRAWS); each stream row by row, so more positions do not change earlier draws
            [generator(stream, self.seed, epoch).random((used, columns)) for stream, columns in WIDTHS.items()], axis=1
        )
        return torch.from_numpy(indices).view(shape), torch.from_numpy(draws).view(*shape, DRAWS)


class RandomSampler(EpochSampler):
    """Every image once per epoch, in random order, in batches of `batch_size`; the remainder of an epoch is left out.

    With `groups`, an epoch has the same length, and every batch has equal shares of the groups, see `balanced_order`:
    an epoch contains only some images of a large group, and repeats those of a small one.

    Args:
        data_source: list of (anything, pid, camid).
        groups: (N,), the group of each item, such as its camera.

    Raises:
        UserError: there are too few images for a batch.
    """

    def __init__(self, data_source: Sequence, batch_size: int, seed: int = 0, groups: Groups = None):
        super().__init__(data_source, batch_size, seed, groups)
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
        order = generator(ORDER, self.seed, epoch)
        if self.groups is None:
            return order.permutation(len(self.data_source))
        return balanced_order(self.groups, len(self.data_source), self.batch_size, order)


class RandomIdentitySampler(EpochSampler):
    """Every identity once per epoch, with K consecutive images: batches of P identities with K images each.

    Hermans, Beyer, Leibe. In Defense of the Triplet Loss for Person Re-Identification. arXiv:1703.07737.

    The K images of an identity are drawn without replacement, or with replacement if it has fewer than K. P is
    batch_size / K; identities that do not fill a last batch are left out of that epoch.

    With `groups` there are two cases. If all images of each identity belong to one group, as with data sets, an epoch
    has the same length, and the identities of a batch are drawn in equal shares from the groups, see `balanced_order`;
    if an identity is repeated, all its images are drawn before any is drawn again. Otherwise, as with cameras, every
    identity is used once, and its K images are from as many of its groups as possible; if it has fewer than K images,
    all of them are among the K.

    Args:
        data_source: list of (anything, pid, camid).
        num_instances: K.
        batch_size: P * K, over all processes; needed for `draw` but not for iterating, unless `groups` shall not repeat
            an identity in a batch.
        groups: (N,), the group of each item, such as its data set or camera.

    Raises:
        UserError: no triplet can be formed: K or P is less than 2, K does not divide the batch, or the data have fewer
            than P identities or only one image of each. The message says what to change.
    """

    def __init__(
        self, data_source: Sequence, num_instances: int = 4, batch_size: int | None = None, seed: int = 0,
        groups: Groups = None,
    ):  # fmt: skip
        super().__init__(data_source, batch_size, seed, groups)
        self.num_instances = num_instances
        pids = np.array([pid for _, pid, _ in data_source], dtype=np.int64)  # (N,)
        self.pids, self.images = np.unique(pids), split_by(pids)  # identities, and the indices of their images
        self.group_of: np.ndarray | None = None  # (identities,), if each belongs to one group
        if self.groups is not None and all(len(np.unique(self.groups[images])) == 1 for images in self.images):
            self.group_of = np.array([self.groups[images[0]] for images in self.images])
        self._check_triplets()

    def _check_triplets(self) -> None:
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
        if self.group_of is not None:
            per_batch = (self.batch_size or k) // k  # P
            identities = balanced_order(self.group_of, len(self.pids), per_batch, generator(ORDER, self.seed, epoch))
            return self.instances_of(identities, instances)
        if self.groups is not None:
            chosen = [np.resize(self.alternating(images, instances), k) for images in self.images]
        else:
            chosen = [instances.choice(images, k, replace=len(images) < k) for images in self.images]
        order = generator(ORDER, self.seed, epoch).permutation(len(chosen))
        return np.stack(chosen)[order].ravel()  # (identities * K,)

    def instances_of(self, identities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """K images for each of `identities` (places,), which may be repeated: (places * K,)."""
        k = self.num_instances
        chosen = np.empty((len(identities), k), dtype=np.int64)
        present, places = np.unique(identities), split_by(identities)
        for identity, repeats in zip(present, places, strict=True):
            chosen[repeats] = repeated(self.images[identity], np.repeat(repeats, k), rng).reshape(-1, k)
        return chosen.ravel()

    def alternating(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Images in random order, but first one of each group, then a second one of each, and so on: (n,)."""
        assert self.groups is not None
        images = rng.permutation(images)
        rank = np.empty(len(images), dtype=np.int64)  # of an image within its group
        for places in split_by(self.groups[images]):
            rank[places] = np.arange(len(places))
        return images[np.argsort(rank, kind='stable')]


class AllImagesSampler(RandomIdentitySampler):
    """Batches of P identities with K images each; every image once per epoch, except for a remainder.

    The images of an identity are shuffled and cut into pieces of K; the last piece is filled with other images of the
    identity, drawn at random. Pieces are distributed over the batches so that the P identities of a batch are distinct.
    The combination and order of pieces is random. Pieces that do not fill a last batch, and surplus pieces of an
    identity that has more of them than there are batches, are left out of the epoch.

    Re-ID baselines since Luo et al., CVPRW 2019, arXiv:1903.07071, draw such batches one by one until fewer than P
    identities are left; an epoch is then shorter by a varying number of batches.

    With `groups` an epoch has the same length, and there are the two cases of RandomIdentitySampler. If each identity
    belongs to one group, the groups have equal shares of the pieces of a batch, to within one piece. An epoch then
    leaves out some pieces of a large group, different ones each time, and repeats those of a small group, recomposed
    after each round; an identity is twice in a batch only if its group has fewer identities than its share of the
    batch. Otherwise each piece of an identity has images from as many different groups as possible.

    Arguments and errors as for RandomIdentitySampler.
    """

    def __init__(
        self, data_source: Sequence, num_instances: int = 4, batch_size: int = 64, seed: int = 0, groups: Groups = None
    ):
        super().__init__(data_source, num_instances, batch_size, seed, groups)
        per_batch = batch_size // num_instances  # P
        pieces = np.array([-(-len(images) // num_instances) for images in self.images])  # (identities,)
        batches = pieces.sum() // per_batch
        while batches > (possible := np.minimum(pieces, batches).sum() // per_batch):
            batches = possible
        self.pieces, self.batches = np.minimum(pieces, batches), int(batches)

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        k = self.num_instances
        instances, order = generator(INSTANCES, self.seed, epoch), generator(ORDER, self.seed, epoch)
        identities, numbers = order.permutation(len(self.images)), self.pieces
        if self.group_of is not None:
            identities, numbers = self.balanced_pieces(identities, order)
        pieces_of = []  # of each identity
        for identity in identities:
            images, number = self.images[identity], numbers[identity]
            if self.group_of is not None:
                pieces_of.append(repeated(images, np.arange(number * k) // k, instances).reshape(number, k))
            elif self.groups is not None:
                pieces_of.append(self.mixed_pieces(images, instances)[:number])
            else:
                images = instances.permutation(images)
                others = images[: len(images) // k * k or None]  # not of the last piece, if possible
                more = instances.choice(others, -len(images) % k, replace=len(images) < k)
                pieces_of.append(np.concatenate([images, more]).reshape(-1, k)[:number])  # (pieces, K)
        pieces = np.concatenate(pieces_of)  # (all, K)
        owners = np.repeat(np.arange(len(pieces_of)), [len(own) for own in pieces_of])  # (all,), places in `identities`
        surplus = order.choice(len(pieces), len(pieces) - self.batches * (self.batch_size // k), replace=False)
        pieces, owners = np.delete(pieces, surplus, axis=0), np.delete(owners, surplus)
        batches = pieces[np.argsort(self.distributed(owners, identities, order), kind='stable')]
        batches = batches.reshape(self.batches, -1, k)  # (batches, P, K)
        shuffled = np.argsort(order.random(batches.shape[:2]), axis=1)  # as they are in the order of their identities
        return batches[np.arange(self.batches)[:, None], shuffled].ravel()

    def distributed(self, owners: np.ndarray, identities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The batch of each piece, int64 (pieces,): P in each batch, and those of an identity in different ones.

        The batches are used in rounds, each in a new random order, so that identities meet different others in each. A
        group that does not fill all its rounds begins with a shorter one; the shorter rounds of all groups take turns
        among the batches.
        """
        turns, places = rng.permutation(self.batches), []
        groups = np.zeros_like(owners) if self.group_of is None else self.group_of[identities[owners]]  # in runs
        for some in np.split(owners, np.flatnonzero(np.diff(groups)) + 1):
            rest = len(some) % self.batches
            places.append(repeated(turns, some, rng, first_round=turns[:rest]))
            turns = np.roll(turns, -rest)
        return np.concatenate(places)

    def balanced_pieces(self, identities: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The identities ordered by group, and the number of pieces of each in an epoch: (identities,) each."""
        assert self.group_of is not None
        members, numbers = split_by(self.group_of[identities]), np.zeros_like(self.pieces)
        total, ordered = self.batches * (self.batch_size // self.num_instances), []
        for turn, group in enumerate(rng.permutation(len(members))):
            ids = identities[members[group]]
            share = len(range(turn, total, len(members)))
            most = max(self.batches, -(-share // len(ids)))  # of an identity: once in each batch, if possible
            while left := share - numbers[ids].sum():
                more = np.minimum(self.pieces[ids], most - numbers[ids])  # another round of all pieces
                surplus = rng.choice(np.repeat(np.arange(len(ids)), more), max(more.sum() - left, 0), replace=False)
                numbers[ids] += more - np.bincount(surplus, minlength=len(ids))
            ordered.append(ids)
        return np.concatenate(ordered), numbers

    def mixed_pieces(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Pieces (n / K, K) of the images of an identity, each from as many groups as possible."""
        assert self.groups is not None
        k, number = self.num_instances, -(-len(images) // self.num_instances)
        images = rng.permutation(images)
        parts = split_by(self.groups[images])
        images = images[np.concatenate([parts[part] for part in rng.permutation(len(parts))])]  # group by group
        pieces = [images[piece::number].tolist() for piece in range(number)]  # neighbours go to different pieces
        for piece in pieces:
            while len(piece) < k:  # add an image, if possible a new one from a new group
                others = rng.permutation(images)
                there = [np.isin(others, piece), np.isin(self.groups[others], self.groups[piece])]
                piece.append(int(others[np.lexsort(there[::-1])[0]]))
        return np.array(pieces)
