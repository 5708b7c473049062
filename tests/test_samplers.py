"""Batches by their properties: what an epoch covers, how a batch is composed, what the draws depend on."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from runtime.errors import UserError
from samplers import (
    AUGMENTATION,
    DRAWS,
    ERASING,
    INSTANCES,
    ORDER,
    AllImagesSampler,
    RandomIdentitySampler,
    RandomSampler,
    generator,
)


def images(*counts: int) -> list:
    """A training set with `counts[pid]` images of each pid, not in the order of the pids."""
    pids = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    return [(f'{index}.jpg', int(pid), index % 6) for index, pid in enumerate(pids)]


def samplers(seed: int = 1):
    data = images(3, 9, 4, 5, 7, 2, 6)
    return RandomSampler(data, 8, seed), RandomIdentitySampler(data, 4, 8, seed), AllImagesSampler(data, 4, 8, seed)


def test_an_epoch_of_images_is_every_image_once_but_for_the_remainder():
    sampler = RandomSampler(images(20, 15, 10), 8)
    indices, draws = sampler.draw(0)
    assert sampler.num_batches == 5
    assert indices.shape == (5, 8) and indices.dtype == torch.int64
    assert draws.shape == (5, 8, DRAWS) and draws.dtype == torch.float64
    assert len(set(indices.flatten().tolist())) == 40
    assert sorted(sampler) == list(range(45))
    left_out = {frozenset(range(45)) - set(sampler.draw(epoch)[0].flatten().tolist()) for epoch in range(5)}
    assert len(left_out) == 5  # others each time


def test_an_epoch_of_identities_is_every_identity_once_with_k_images():
    data = images(3, 9, 4, 5, 7, 2, 6)
    sampler = RandomIdentitySampler(data, 4, 8, seed=3)
    indices, draws = sampler.draw(2)
    assert sampler.num_batches == 3 and len(sampler) == 28
    assert indices.shape == (3, 8) and draws.shape == (3, 8, DRAWS)
    own = Counter(pid for _, pid, _ in data)
    seen = []
    for batch in indices.view(3, 2, 4).tolist():  # P x K
        for chosen in batch:
            (pid,) = {data[index][1] for index in chosen}
            seen.append(pid)
            assert len(set(chosen)) == 4 if own[pid] >= 4 else len(set(chosen)) <= own[pid]
    assert len(set(seen)) == 6  # of 7: one does not fill a batch


@pytest.mark.parametrize(
    'counts', [(3, 9, 4, 5, 7, 2, 6), (4, 4), (1, 2), (20, 3, 3, 3), (1, 1, 1, 8), (16, 16, 16, 17), (40, *[9] * 12)]
)
@pytest.mark.parametrize(('k', 'batch'), [(4, 8), (2, 4), (4, 16)])
def test_an_epoch_of_all_images_is_dealt_to_batches_of_distinct_identities(counts, k, batch):
    if len(counts) < batch // k:
        return
    data = images(*counts)
    sampler = AllImagesSampler(data, k, batch, seed=2)
    seen = Counter()
    for epoch in range(3):
        indices, draws = sampler.draw(epoch)
        assert indices.shape == (sampler.num_batches, batch) and draws.shape == (sampler.num_batches, batch, DRAWS)
        for groups in indices.view(-1, batch // k, k).tolist():
            pids = [{data[index][1] for index in group} for group in groups]
            assert all(len(own) == 1 for own in pids) and len(set.union(*pids)) == batch // k
            for group, (pid,) in zip(groups, pids, strict=True):
                assert len(set(group)) == min(k, counts[pid])
        seen.update(set(indices.flatten().tolist()))
    groups = sorted(-(-count // k) for count in counts)
    if max(groups) <= sum(groups) // (batch // k):  # no identity has more groups than there are batches
        assert sampler.num_batches == sum(groups) // (batch // k)
        left_out = sum(groups) % (batch // k)  # groups per epoch
        assert sum(seen.values()) >= 3 * (len(data) - left_out * k)


def test_an_epoch_of_all_images_leaves_out_only_the_surplus_of_a_frequent_identity():
    data = images(40, 4, 4, 4)
    sampler = AllImagesSampler(data, 4, 8)
    assert sampler.num_batches == 3  # identity 0 once in each, beside one of the others
    indices, _ = sampler.draw(0)
    assert Counter(data[index][1] for index in indices.flatten().tolist()) == {0: 12, 1: 4, 2: 4, 3: 4}


def test_other_identities_meet_in_each_epoch():
    data = images(*[8] * 20)
    sampler = AllImagesSampler(data, 4, 16)
    met = Counter()
    for epoch in range(200):
        for batch in sampler.draw(epoch)[0].tolist():
            pids = {data[index][1] for index in batch}
            met.update((a, b) for a in pids for b in pids if a < b)
    expected = 200 * 10 * 6 / 190  # batches, pairs in each, pairs of identities
    assert len(met) == 190
    assert max(abs(count - expected) for count in met.values()) < 6 * expected**0.5


def test_all_images_of_an_identity_are_drawn_equally_often():
    data = images(10, 10)
    sampler = RandomIdentitySampler(data, 4, 8)
    drawn = Counter(index for epoch in range(500) for index in sampler.draw(epoch)[0].flatten().tolist())
    assert set(drawn) == set(range(20))
    assert max(abs(count - 200) for count in drawn.values()) < 60  # 5.5 standard deviations


def test_market1501_and_mars_have_the_steps_of_the_original():
    market = images(*[17] * 750, 186)
    assert len(market) == 12936
    assert RandomSampler(market, 32).num_batches == 404
    assert RandomIdentitySampler(market, 4, 32).num_batches == 93
    assert len(RandomIdentitySampler(market, 4, 32)) == 3004
    mars = images(*[4] * 625)
    assert RandomIdentitySampler(mars, 4, 32).num_batches == 78


@pytest.mark.parametrize('kind', [0, 1, 2])
def test_an_epoch_is_a_function_of_seed_and_epoch(kind):
    first, again, other = (samplers(seed)[kind] for seed in (1, 1, 2))
    first.draw(7)  # what was drawn before does not matter
    for one, two in zip(first.draw(3), again.draw(3), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(first.draw(3), other.draw(3), strict=True):
        assert not torch.equal(one, two)
    for one, two in zip(first.draw(3), first.draw(4), strict=True):
        assert not torch.equal(one, two)


def test_seeds_of_any_size_and_sign_differ():
    seeds = [0, 1, -1, 2**31, -(2**31), 2**32, 2**64 + 1, -(2**64) - 1]
    epochs = {tuple(samplers(seed)[0].draw(0)[1].flatten().tolist()) for seed in seeds}
    assert len(epochs) == len(seeds)


def test_streams_of_random_numbers_are_independent():
    assert len({generator(stream, 1, 0).random() for stream in (ORDER, INSTANCES, AUGMENTATION, ERASING)}) == 4


def test_the_draws_of_a_position_depend_on_nothing_else():
    data = images(20, 20)
    small = RandomSampler(data[:16], 4, seed=5).draw(1)[1].view(-1, DRAWS)
    large = RandomSampler(data, 8, seed=5).draw(1)[1].view(-1, DRAWS)
    identities = RandomIdentitySampler(data, 4, 8, seed=5).draw(1)[1].view(-1, DRAWS)
    assert torch.equal(small, large[:16])
    assert torch.equal(identities, large[:8])


def test_the_draws_are_uniform_and_independent_of_the_order():
    sampler = RandomSampler(images(2000, 2000), 4000)
    indices, draws = sampler.draw(0)
    draws = draws.view(-1, DRAWS)
    assert draws.min() >= 0 and draws.max() < 1
    together = np.corrcoef(np.column_stack([draws, indices.view(-1)]).T)
    assert np.abs(together - np.eye(DRAWS + 1)).max() < 0.08
    assert np.abs(np.histogram(draws, 10, (0, 1))[0] / (400 * DRAWS) - 1).max() < 0.1


@pytest.mark.parametrize('kind', [0, 1, 2])
def test_the_global_generators_are_left_alone(kind):
    sampler = samplers()[kind]
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    sampler.draw(0)
    list(sampler)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002


@pytest.mark.parametrize('kind', [0, 1, 2])
def test_a_plain_dataloader_makes_the_same_batches(kind):
    sampler = samplers()[kind]
    sampler.set_epoch(6)
    batches = list(DataLoader(range(1000), batch_size=8, sampler=sampler, drop_last=True))
    assert len(DataLoader(range(1000), batch_size=8, sampler=sampler, drop_last=True)) == len(batches)
    assert torch.equal(torch.stack(batches), sampler.draw(6)[0])


def test_without_a_batch_size_identities_can_be_iterated():
    sampler = RandomIdentitySampler(images(5, 5, 5), num_instances=2)
    assert len(list(sampler)) == len(sampler) == 6


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: RandomSampler(images(10, 10), 32), r'only 20 images: use --train-batch 20 or less'),
        (lambda: RandomSampler([], 32), r'the training set is empty'),
        (lambda: RandomSampler(images(4), 0), r'--train-batch is 0'),
        (lambda: RandomIdentitySampler(images(4, 4), 4, -8), r'--train-batch is -8'),
        (lambda: RandomIdentitySampler(images(4, 4), 1, 8), r'--num-instances is 1: a triplet needs at least 2'),
        (lambda: RandomIdentitySampler(images(40), 4, 8), r'has 1 identities, but a triplet needs 2'),
        (lambda: RandomIdentitySampler([], 4, 8), r'has 0 identities'),
        (lambda: RandomIdentitySampler(images(*[1] * 9), 4, 8), r'each of the 9 identities .* one image'),
        (lambda: RandomIdentitySampler(images(*[4] * 9), 4, 30), r'does not divide .* 30: use --train-batch 28 or 32'),
        (
            lambda: RandomIdentitySampler(images(*[4] * 9), 4, 7),
            r'does not divide --train-batch 7: use --train-batch 8',
        ),
        (lambda: RandomIdentitySampler(images(*[4] * 3), 4, 13), r'does not divide .* use --train-batch 12$'),
        (lambda: RandomIdentitySampler(images(*[4] * 3), 4, 99), r'does not divide .* use --train-batch 12$'),
        (
            lambda: RandomIdentitySampler(images(*[4] * 9), 4, 4),
            r'has room for one identity .* use --train-batch 8 or more',
        ),
        (lambda: RandomIdentitySampler(images(4, 4, 4), 4, 32), r'only 3: use --train-batch 12 or less'),
    ],
)
def test_what_gives_no_batch_is_refused_with_what_to_change(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert '\n' not in str(error.value)


def test_what_the_messages_propose_works():
    RandomSampler(images(10, 10), 20)
    for count, batches in {9: (28, 32, 8), 3: (12,)}.items():
        for batch in batches:
            RandomIdentitySampler(images(*[4] * count), 4, batch).draw(0)


def test_identities_are_dealt_to_all_processes():
    data = images(*[8] * 8)
    indices, _ = RandomIdentitySampler(data, 4, 32).draw(0)
    for world_size in (2, 4):
        for rank in range(world_size):
            assert len({data[index][1] for index in indices[0, rank::world_size]}) == 8
