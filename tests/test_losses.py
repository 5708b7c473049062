"""Each loss against its textbook loop in float64, gradients included, over dtypes and corner cases."""

import math

import pytest
import textbook
import torch

from losses import CenterLoss, CrossEntropyLabelSmooth, TripletLoss, collapsed

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
BATCHES = {  # pids of a batch
    'P x K': [3, 3, 3, 3, 0, 0, 0, 0, 7, 7, 7, 7],
    'shuffled': [5, 1, 5, 2, 1, 2, 2, 1, 5, 5],
    'some alone': [4, 4, 4, 0, 1, 1, 2],
    'two identities': [1, 0, 1, 0],
    'two images': [6, 2],
    'one identity': [2, 2, 2, 2],
    'one image per identity': [3, 1, 4, 0, 5],
    'one image': [2],
}


def draw(*shape, dtype=torch.float64, seed=0, scale=1.0):
    """A leaf of standard normal numbers, rounded to dtype."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * values).to(dtype).requires_grad_()


def leaf64(tensor):
    return tensor.detach().double().requires_grad_()


def assert_equal_losses(loss, expected, *leaves):
    """Equal values, and equal gradients of pairs of leaves, to the accuracy of the first leaf of a pair."""
    dtype = leaves[0][0].dtype
    at_least_float32 = torch.promote_types(dtype, torch.float32)
    assert loss.shape == () and loss.dtype == at_least_float32
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}[at_least_float32]
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    loss.backward()
    expected.backward()
    for leaf, reference in leaves:
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8}[leaf.dtype]
        torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('num_classes', [1, 2, 751])
@pytest.mark.parametrize('epsilon', [0.0, 0.1, 1.0])
def test_label_smoothing_is_the_textbook_sum(dtype, num_classes, epsilon):
    logits = draw(6, num_classes, dtype=dtype, scale=3)
    pids = torch.randint(num_classes, (6,), generator=torch.Generator().manual_seed(1))
    reference = leaf64(logits)
    expected = textbook.cross_entropy_label_smooth(reference, pids, epsilon)
    assert_equal_losses(CrossEntropyLabelSmooth(num_classes, epsilon)(logits, pids), expected, (logits, reference))


def test_label_smoothing_is_a_tenth_unless_told():
    logits, pids = draw(3, 5), torch.tensor([4, 0, 4])
    torch.testing.assert_close(
        CrossEntropyLabelSmooth(5)(logits, pids), textbook.cross_entropy_label_smooth(logits, pids)
    )


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('batch', BATCHES)
@pytest.mark.parametrize('apart', [0.0, 0.3, 3.0])
def test_triplet_is_the_textbook_loop(dtype, batch, apart):
    pids = torch.tensor(BATCHES[batch])
    features = (draw(len(pids), 5, scale=0.1) + apart * draw(9, 5, seed=1)[pids]).detach().to(dtype).requires_grad_()
    reference = leaf64(features)
    expected, active = textbook.triplet(reference, pids)
    criterion = TripletLoss()
    assert_equal_losses(criterion(features, pids), expected, (features, reference))
    assert criterion.active.item() == pytest.approx(active)


@pytest.mark.parametrize(('margin', 'active'), [(0, 0.0), (0.3, 0.3), (5, 1.0), (None, 0.0)])
def test_the_margin_decides_what_is_active(margin, active):
    pids = torch.tensor(BATCHES['shuffled'])
    features = (draw(10, 5, scale=0.1) + 0.3 * draw(9, 5, seed=1)[pids]).detach().requires_grad_()
    reference = leaf64(features)
    expected, textbook_active = textbook.triplet(reference, pids, margin)
    criterion = TripletLoss(margin)
    assert_equal_losses(criterion(features, pids), expected, (features, reference))
    assert criterion.active.item() == pytest.approx(textbook_active) and textbook_active == active


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('batch', BATCHES)
def test_the_soft_margin_is_the_textbook_loop(dtype, batch):
    pids = torch.tensor(BATCHES[batch])
    features = draw(len(pids), 5, scale=0.1).detach().to(dtype).requires_grad_()
    reference, criterion = leaf64(features), TripletLoss(None)
    expected, active = textbook.triplet(reference, pids, None)
    assert_equal_losses(criterion(features, pids), expected, (features, reference))
    assert criterion.active.item() == pytest.approx(active)


def test_a_collapsed_network_under_the_soft_margin():
    criterion = TripletLoss(None)
    assert criterion(torch.full((8, 5), 0.7), torch.arange(8) // 4).item() == pytest.approx(math.log(2))
    assert criterion.collapsed == 1


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_collapsed_network_is_at_the_margin_without_a_gradient(dtype):
    features = torch.full((8, 5), 0.7, dtype=dtype, requires_grad=True)
    criterion = TripletLoss(0.3)
    loss = criterion(features, torch.arange(8) // 4)
    loss.backward()
    assert loss.item() == pytest.approx(0.3) and criterion.active.item() == 1
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_an_image_drawn_twice_keeps_the_gradient_finite():
    pids = torch.tensor([0, 0, 1, 1])
    values = draw(4, 5, scale=0.1).detach()
    values[1] = values[0]  # the sampler repeats images of identities that have fewer than K
    features, reference = values.clone().requires_grad_(), values.clone().requires_grad_()
    expected, _ = textbook.triplet(reference, pids)
    assert_equal_losses(TripletLoss()(features, pids), expected, (features, reference))
    assert features.grad.isfinite().all() and features.grad[:2].any()


def test_small_distances_far_from_the_origin_keep_their_digits():
    """|a|^2 + |b|^2 - 2ab would be wrong by more than the margin here, in float32."""
    pids = torch.arange(12) // 4
    features = (draw(12, 64, scale=0.02).detach() + 300).float().requires_grad_()
    reference = leaf64(features)
    expected, _ = textbook.triplet(reference, pids)
    assert_equal_losses(TripletLoss()(features, pids), expected, (features, reference))


def test_autocast_does_not_round_the_losses():
    pids = torch.arange(12) // 4
    features = draw(12, 64, dtype=torch.float32)
    for criterion in (CrossEntropyLabelSmooth(64), TripletLoss(), CenterLoss(12, 64)):
        plain = criterion(features, pids)
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(criterion(features, pids), plain)


@pytest.mark.parametrize('batch', ['P x K', 'one identity', 'one image per identity'])
def test_nan_is_not_hidden(batch):
    pids = torch.tensor(BATCHES[batch])
    features = draw(len(pids), 8).detach()
    features[1, 2] = torch.nan
    for criterion in (CrossEntropyLabelSmooth(8), TripletLoss(), CenterLoss(8, 8)):
        assert criterion(features, pids).isnan()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('batch', BATCHES)
def test_center_is_the_textbook_loop(dtype, batch):
    pids = torch.tensor(BATCHES[batch])
    features, criterion = (
        draw(len(pids), 5, dtype=dtype),
        CenterLoss(9, 5).to(torch.promote_types(dtype, torch.float32)),
    )
    reference, centers = leaf64(features), leaf64(criterion.centers)
    expected = textbook.center(reference, centers, pids)
    assert_equal_losses(criterion(features, pids), expected, (features, reference), (criterion.centers, centers))
    absent = [k for k in range(9) if k not in BATCHES[batch]]
    assert not criterion.centers.grad[absent].any() and criterion.centers.grad[BATCHES[batch]].any()


def test_center_is_clamped_at_both_ends():
    criterion = CenterLoss(2, 3)
    features = criterion.centers.detach().clone()
    features[1] = 1e7
    features.requires_grad_()
    loss = criterion(features, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx((1e-12 + 1e12) / 2)
    assert not features.grad.any() and not criterion.centers.grad.any()


def test_centers_are_standard_normal_and_decided_by_the_seed():
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(CenterLoss(100, 64).centers.detach())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert abs(drawn[0].mean()) < 0.05 and abs(drawn[0].std() - 1) < 0.05


def test_only_the_centers_are_state():
    triplet = TripletLoss()
    triplet(draw(4, 3), torch.tensor([0, 0, 1, 1]))
    assert not triplet.state_dict() and not CrossEntropyLabelSmooth(3).state_dict()
    assert list(CenterLoss(3, 2).state_dict()) == ['centers']
    assert not triplet.active.requires_grad


@pytest.mark.parametrize('pid', [-1, 5])
def test_a_pid_without_a_center_is_refused(pid):
    with pytest.raises(IndexError):
        CenterLoss(5, 3)(draw(1, 3), torch.tensor([pid]))


@pytest.mark.parametrize('criterion', [CrossEntropyLabelSmooth(5), TripletLoss(), CenterLoss(4, 5)])
def test_wrong_shapes_are_named(criterion):
    pids = torch.tensor([0, 0, 1])
    wrong = [(draw(2, 5), pids), (draw(3, 5), pids[:, None]), (draw(15), pids), (draw(0, 5), pids[:0])]
    if not isinstance(criterion, TripletLoss):
        wrong.append((draw(3, 4), pids))
    for values, targets in wrong:
        with pytest.raises(ValueError, match=r'expected \(B, \d+\) and \(B,\)'):
            criterion(values, targets)


def test_a_negative_margin_is_refused():
    with pytest.raises(ValueError, match='margin'):
        TripletLoss(-0.1)


@pytest.mark.parametrize('criterion', [CrossEntropyLabelSmooth(5), TripletLoss(), CenterLoss(4, 5)])
def test_the_host_needs_no_value(criterion):
    """On the meta device tensors have no values: whatever waits for one raises there."""
    loss = criterion.to('meta')(torch.zeros(3, 5, device='meta'), torch.zeros(3, dtype=torch.int64, device='meta'))
    assert loss.shape == () and loss.is_meta


@pytest.mark.parametrize('criterion', [CrossEntropyLabelSmooth(5), TripletLoss(), CenterLoss(4, 5)])
def test_one_graph_for_the_compiler(criterion):
    features, pids = draw(6, 5, dtype=torch.float32), torch.arange(6) // 2
    compiled = torch.compile(criterion, backend='eager', fullgraph=True)
    assert torch.equal(compiled(features, pids), criterion(features, pids))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('criterion', [CrossEntropyLabelSmooth(64), TripletLoss(), CenterLoss(64, 64)])
def test_cuda_computes_the_same_without_waiting(criterion):
    pids = torch.arange(32) // 4
    features = draw(32, 64, dtype=torch.float32)
    on_cuda = features.detach().cuda().requires_grad_()
    loss = criterion(features, pids)
    loss.backward()
    criterion, cuda_pids = criterion.cuda(), pids.cuda()
    torch.cuda.set_sync_debug_mode('error')
    try:
        cuda_loss = criterion(on_cuda, cuda_pids)
        cuda_loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    torch.testing.assert_close(cuda_loss.cpu(), loss)
    torch.testing.assert_close(on_cuda.grad.cpu(), features.grad)


@pytest.mark.parametrize(
    ('features', 'expected'),
    [
        (torch.ones(8, 4), 1),
        (torch.ones(8, 4) + 1e-5 * torch.randn(8, 4), 1),
        (torch.ones(8, 4) + 0.1 * torch.randn(8, 4), 0),
        (torch.randn(8, 4), 0),
        (torch.ones(1, 4), 0),
        (torch.ones(8, 4, dtype=torch.bfloat16, requires_grad=True), 1),
    ],
)
def test_collapsed_features_are_noticed(features, expected):
    found = collapsed(features)
    assert found == expected and found.shape == () and not found.requires_grad


def test_a_triplet_loss_at_the_margin_is_collapse():
    """Also where the features differ: none of an identity is nearer than those of others."""
    criterion, pids = TripletLoss(0.3), torch.arange(8) // 4
    criterion(torch.eye(8), pids)  # all distances are equal
    assert criterion.collapsed == 1
    criterion(torch.randn(8, 4), pids)
    assert criterion.collapsed == 0
    criterion(torch.randn(8, 4) + 50 * pids[:, None], pids)  # learned
    assert criterion.collapsed == 0
