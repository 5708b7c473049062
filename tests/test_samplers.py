"""Batches by their properties: what an epoch covers, how a batch is composed, what the draws depend on."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from batches.rounds import balanced_order, repeated
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


@pytest.mark.parametrize('sets', [1, 2, 3])
def test_an_identity_meets_many_others_in_an_epoch(sets):
    """Of 59 others an identity meets 27 in 5 batches of 8 that are independent, and 13 in consecutive ones."""
    data = images(*[20] * 60)
    groups = np.array([pid % sets for _, pid, _ in data]) if sets > 1 else None
    met = np.zeros((60, 60))
    for batch in AllImagesSampler(data, 4, 32, groups=groups).draw(0)[0].tolist():
        pids = list({data[index][1] for index in batch})
        met[np.ix_(pids, pids)] = 1
    assert met.sum(1).mean() - 1 > 24


def test_identities_of_a_small_group_are_spread_evenly_over_the_batches():
    data = images(*[9] * 12, 30, 50)  # the last two share half of each batch, so each is there several times
    groups = np.array([int(pid >= 12) for _, pid, _ in data])
    for seed in range(20):
        sampler = AllImagesSampler(data, 4, 24, seed, groups)
        pids = np.array([pid for _, pid, _ in data])[sampler.draw(0)[0].numpy()].reshape(-1, 6, 4)[:, :, 0]
        for pid in (12, 13):
            assert np.ptp((pids == pid).sum(1)) <= 1


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


# ---- groups: --balance ----


def shares(groups, chosen):
    """The number of each group's items in each row of `chosen`: (rows, groups)."""
    return np.stack([(groups[chosen] == group).sum(1) for group in np.unique(groups)], axis=1)


@pytest.mark.parametrize('batch', [1, 2, 3, 7, 8, 32])
@pytest.mark.parametrize('sizes', [(50, 50), (100, 7), (3, 60, 20), (40, 1), (9, 1, 2, 30, 5, 5, 4, 3)])
def test_every_batch_and_the_epoch_have_equal_shares_of_the_groups(sizes, batch):
    groups = np.random.default_rng(1).permutation(np.repeat([7, -3, 50, 4, 9, 12, 1, 0][: len(sizes)], sizes))
    count = len(groups) // batch * batch
    chosen = balanced_order(groups, count, batch, np.random.default_rng(5)).reshape(-1, batch)
    for counts in (shares(groups, chosen), shares(groups, chosen.reshape(1, -1))):
        assert (counts.max(1) - counts.min(1) <= 1).all()
    times = np.bincount(chosen.ravel(), minlength=len(groups))
    for group in np.unique(groups):
        own = times[groups == group]
        assert own.max() - own.min() <= 1  # all of them before any comes again
        for row in chosen:
            part = row[groups[row] == group]
            assert len(set(part.tolist())) == min(len(part), len(own))


def test_all_come_before_any_comes_again_in_each_place_of_the_order():
    batches = np.arange(70) // 4
    for seed in range(20):
        order = repeated(np.arange(100, 109), batches, np.random.default_rng(seed)).tolist()
        assert len(order) == 70
        for begin in range(0, 63, 9):
            assert sorted(order[begin : begin + 9]) == list(range(100, 109))
        for batch in range(18):
            own = order[4 * batch : 4 * batch + 4]
            assert len(set(own)) == len(own)


def test_the_order_of_a_group_is_uniform():
    """Each of 6 items comes equally often in each of the first 10 places, and where a batch spans two rounds."""
    counts = np.zeros((10, 6))
    for seed in range(3000):
        order = repeated(np.arange(6), np.arange(10) // 4, np.random.default_rng(seed))
        counts[np.arange(10), order] += 1
    assert abs(counts - 500).max() < 6 * 500**0.5


def unequal():
    """Two sets of 10 and 4 identities, with their sets, and their images with cameras."""
    data = images(*[9, 5, 12, 3, 8, 6, 7, 4, 1, 20], *[5, 2, 8, 3])
    sets = np.array([int(pid >= 10) for _, pid, _ in data])
    return data, sets


def balanced(seed=1, cameras=False):
    data, sets = unequal()
    groups = np.array([camid for _, _, camid in data]) if cameras else sets
    return [
        RandomSampler(data, 8, seed, groups),
        RandomIdentitySampler(data, 4, 16, seed, groups),
        AllImagesSampler(data, 4, 16, seed, groups),
    ]


@pytest.mark.parametrize('cameras', [False, True])
@pytest.mark.parametrize('kind', [0, 1, 2])
def test_a_balanced_epoch_has_its_length_and_is_a_function_of_seed_and_epoch(kind, cameras):
    first, again, other = (balanced(seed, cameras)[kind] for seed in (1, 1, 2))
    data, _ = unequal()
    plain = [RandomSampler(data, 8), RandomIdentitySampler(data, 4, 16), AllImagesSampler(data, 4, 16)][kind]
    assert (len(first), first.num_batches) == (len(plain), plain.num_batches)
    first.draw(7)
    assert torch.equal(first.draw(3)[0], again.draw(3)[0])
    assert not torch.equal(first.draw(3)[0], other.draw(3)[0])
    assert not torch.equal(first.draw(3)[0], first.draw(4)[0])
    first.set_epoch(3)
    assert list(first)[: first.draw(3)[0].numel()] == first.draw(3)[0].flatten().tolist()
    assert torch.equal(first.draw(3)[1], plain.__class__.draw(again, 3)[1])


def test_groups_of_images_have_equal_shares():
    data, sets = unequal()
    cameras = np.array([camid for _, _, camid in data])
    for groups in (sets, cameras):
        indices = RandomSampler(data, 8, 1, groups.tolist()).draw(0)[0].numpy()
        counts = shares(groups, indices)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize('sampler', [RandomIdentitySampler, AllImagesSampler])
@pytest.mark.parametrize('batch', [8, 12, 16, 28])
def test_identities_come_in_equal_shares_from_the_data_sets(sampler, batch):
    data, sets = unequal()
    pids = np.array([pid for _, pid, _ in data])
    made = sampler(data, 4, batch, 3, sets)
    for epoch in range(4):
        indices = made.draw(epoch)[0].numpy()
        assert indices.shape == (made.num_batches, batch)
        pieces = indices.reshape(made.num_batches, -1, 4)  # (batches, P, K)
        assert (pids[pieces] == pids[pieces][:, :, :1]).all()
        counts = shares(sets, pieces[:, :, 0])
        assert abs(counts[:, 0] - counts[:, 1]).max() <= 1
        assert abs(counts.sum(0)[0] - counts.sum(0)[1]) <= 1
        for row in pids[pieces[:, :, 0]]:
            assert len(set(row.tolist())) == len(row)  # the share of the smaller set is at most its 4 identities
        own = Counter(pids.tolist())
        for piece in pieces.reshape(-1, 4).tolist():
            assert len(set(piece)) == min(4, own[pids[piece[0]]])
        times = np.bincount(indices.ravel(), minlength=len(data))
        for pid in range(14):  # all images of an identity before any comes again, but those that complete a piece
            images_of, times_of = own[pid], times[pids == pid]
            assert times_of.max() - times_of.min() <= (1 if images_of >= 4 else 4)
    seen = {index for epoch in range(60) for index in made.draw(epoch)[0].flatten().tolist()}
    assert len(seen) == len(data)  # others in each epoch


def test_a_set_with_fewer_identities_than_its_share_repeats_them_in_a_batch():
    data = images(*[6] * 20, 6)
    sets = np.array([int(pid == 20) for _, pid, _ in data])
    for sampler in (RandomIdentitySampler, AllImagesSampler):
        indices = sampler(data, 4, 16, 1, sets).draw(0)[0].numpy()
        assert (shares(sets, indices) == 8).all()


def test_the_small_set_is_repeated_evenly_and_the_large_one_seen_in_part():
    data, sets = unequal()
    pids = np.array([pid for _, pid, _ in data])
    made = RandomIdentitySampler(data, 4, 8, 1, sets)
    times = Counter(pids[made.draw(0)[0].numpy()[:, ::4]].ravel().tolist())
    assert [times[pid] for pid in range(10, 14)] in ([2, 2, 2, 1], [2, 2, 1, 2], [2, 1, 2, 2], [1, 2, 2, 2], [2] * 4)
    assert sum(times[pid] for pid in range(10)) == 7 and max(times[pid] for pid in range(10)) == 1
    parts = {frozenset(pids[made.draw(epoch)[0].numpy()].ravel().tolist()) for epoch in range(5)}
    assert len(parts) > 1  # others in each epoch


def cameras_of(counts, seed=0):
    """One list of images of each identity, with counts[identity][camera] images."""
    items = [(pid, camid) for pid, own in enumerate(counts) for camid, number in enumerate(own) for _ in range(number)]
    order = np.random.default_rng(seed).permutation(len(items))
    return [(f'{place}.jpg', *items[place]) for place in order]


COUNTS = [(9, 1, 1), (4, 4), (2, 0, 0, 1), (0, 1), (1, 1, 1, 1, 1, 1), (30, 5, 1, 1), (0, 6), (3, 3, 3)]


def test_the_images_of_an_identity_come_from_as_many_cameras_as_it_has():
    data = cameras_of(COUNTS)
    pids, camids = (np.array([item[column] for item in data]) for column in (1, 2))
    sampler = RandomIdentitySampler(data, 4, 16, 1, camids)
    assert sampler.group_of is None
    firsts = set()
    for epoch in range(30):
        pieces = np.array(sampler.order(epoch)).reshape(-1, 4)
        assert sorted(pids[pieces[:, 0]]) == list(range(8))  # every identity once
        for piece in pieces:
            own = np.flatnonzero(pids == pids[piece[0]])
            assert len(set(camids[piece])) == min(4, len(set(camids[own])))
            assert len(set(piece.tolist())) == min(4, len(own))
        firsts.update(pieces[pids[pieces[:, 0]] == 5].ravel().tolist())
    assert len(firsts) > 25  # of the 37 images of identity 5


def test_the_pieces_of_an_identity_are_of_different_cameras_as_far_as_possible():
    data = cameras_of(COUNTS)
    pids, camids = (np.array([item[column] for item in data]) for column in (1, 2))
    sampler = AllImagesSampler(data, 4, 8, 1, camids)
    rng = np.random.default_rng(0)
    for pid, counts in enumerate(COUNTS):
        own = np.flatnonzero(pids == pid)
        pieces = sampler.mixed_pieces(own, rng)
        number = -(-len(own) // 4)
        assert pieces.shape == (number, 4) and set(pieces.ravel().tolist()) == set(own.tolist())
        different = sum(len(set(camids[piece])) for piece in pieces)
        assert different >= sum(min(count, number) for count in counts)  # no division of the images has more
        assert all(len(set(piece.tolist())) == min(4, len(own)) for piece in pieces)
    indices = sampler.draw(0)[0].numpy().reshape(-1, 2, 4)
    assert (pids[indices] == pids[indices][:, :, :1]).all() and (pids[indices[:, 0, 0]] != pids[indices[:, 1, 0]]).all()
    plain = AllImagesSampler(data, 4, 8, 1)
    of_cameras, of_none = (
        np.mean([len(set(camids[piece])) for epoch in range(9) for piece in made.draw(epoch)[0].view(-1, 4).tolist()])
        for made in (sampler, plain)
    )
    assert of_cameras > of_none + 0.2


def test_groups_of_another_number_of_items_are_a_mistake_of_the_script():
    with pytest.raises(ValueError, match='groups of 3 items, but 40 items'):
        RandomSampler(images(20, 20), 8, 1, [0, 1, 0])


def test_identities_of_one_group_are_iterated_without_a_batch_size():
    data, sets = unequal()
    sampler = RandomIdentitySampler(data, 2, groups=sets)
    assert len(list(sampler)) == len(sampler) == 28
