"""The losses of the experiments: label smoothing, batch-hard triplets, distances to centers.

Each loss is a mean over the batch and depends only on its arguments. Triplets compare images with each other, so with
several processes the triplet loss needs the features and pids of the whole batch; the other two do not. No loss waits
for the device. None uses a matrix product, so neither TF32 nor autocast can round a distance.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_SQUARE = 1e-12  # lower clamp of squared distances, without a gradient: the slope of sqrt at 0 is infinite
LARGEST_SQUARE = 1e12


class CrossEntropyLabelSmooth(nn.Module):
    """Cross entropy against smoothed labels, (1 - epsilon) * onehot + epsilon / num_classes.

    Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016, arXiv:1512.00567.

    Args:
        num_classes: number of training identities. With a single identity the loss is zero.
        epsilon: fraction of the label that is distributed evenly over all identities, 0 to 1; 0 is plain cross entropy.
    """

    def __init__(self, num_classes: int, epsilon: float = 0.1) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.epsilon = epsilon

    def forward(self, logits: Tensor, pids: Tensor) -> Tensor:
        """Mean over the batch, 0-dim, of logits (B, num_classes) and pids (B,) in 0..num_classes-1.

        Raises:
            ValueError: the shapes do not fit.
        """
        _check_shapes(logits, pids, self.num_classes)
        return F.cross_entropy(_float(logits), pids, label_smoothing=self.epsilon)


def collapsed(features: Tensor) -> Tensor:
    """1 if the features (B, D) are nearly equal, else 0: a detached 0-dim float on their device.

    Nearly equal: none is farther from their mean than a thousandth of the mean's length. One image is never collapsed.
    """
    features = features.detach().float()
    mean = features.mean(0)  # (D,)
    farthest = (features - mean).norm(dim=1).max()  # ()
    equal: Tensor = (farthest <= 1e-3 * mean.norm()) & (len(features) > 1)
    return equal.float()


class TripletLoss(nn.Module):
    """Batch-hard triplets: each image is an anchor once, against its farthest positive and its nearest negative.

    Hermans et al., In Defense of the Triplet Loss for Person Re-Identification, 2017, arXiv:1703.07737.

    Distances are Euclidean, between features that are not normalised, and at least 1e-6. Corner cases: identical
    features have a zero gradient; if all features of a batch are identical (a collapsed network), the loss is the
    margin and all triplets are active; an anchor without another image of its identity is its own positive, as in the
    original; a batch without a triplet (one identity, or one image per identity) gives a differentiable zero. With
    margin 0 or a soft margin, a triplet whose two distances are equal is not active.

    Args:
        margin: how much farther a negative must be than a positive, in units of the features. None is the paper's soft
            margin, log(1 + exp(positive - negative)), which is positive for each triplet, and log 2 for a
            collapsed network.

    Attributes:
        active: fraction of the anchors in the last call whose triplet violates the margin, or with a soft margin whose
            positive is farther than the negative; a detached 0-dim tensor on the device of the features. Only reading
            it waits for the device.
        collapsed: as returned by `collapsed`, but also 1 if all triplets are active and the loss is near the margin, as
            when features are nearly equal because all are nearly 0.

    Raises:
        ValueError: the margin is negative.
    """

    def __init__(self, margin: float | None = 0.3) -> None:
        super().__init__()
        if margin is not None and margin < 0:
            raise ValueError(f'the margin of the triplet loss must not be negative, but is {margin}')
        self.margin = margin
        self.active = self.collapsed = torch.zeros(())  # not buffers: they are not part of a run's state

    def forward(self, features: Tensor, pids: Tensor) -> Tensor:
        """Mean over the anchors, 0-dim, of features (B, D) and pids (B,).

        Raises:
            ValueError: the shapes do not fit.
        """
        _check_shapes(features, pids, features.shape[-1])
        features = _float(features)  # (B, D)
        same = pids[:, None] == pids[None, :]  # (B, B), the anchor itself included

        with torch.no_grad():  # mining only selects pairs; |a|^2 + |b|^2 - 2ab would lose small distances
            distances = torch.cdist(features, features, compute_mode='donot_use_mm_for_euclid_dist')  # (B, B)
            positives = distances.masked_fill(~same, -1).argmax(dim=1)  # (B,), the farthest of the same identity
            negatives = distances.masked_fill(same, torch.inf).argmin(dim=1)  # (B,), the nearest of another identity
            holds_triplet = (same.sum(dim=1) > 1).any() & ~same.all()  # (), a positive and a negative exist

        to_positive = _squared_distance(features, features[positives]).clamp(min=SMALLEST_SQUARE).sqrt()  # (B,)
        to_negative = _squared_distance(features, features[negatives]).clamp(min=SMALLEST_SQUARE).sqrt()  # (B,)
        if self.margin is None:
            difference = to_positive - to_negative  # (B,)
            self.active = ((difference.detach() > 0) & holds_triplet).float().mean()
            self.collapsed = collapsed(features)
            return (F.softplus(difference) * holds_triplet).mean()
        hinge = F.relu(self.margin + to_positive - to_negative) * holds_triplet  # (B,); NaN stays NaN, and ends the run
        loss = hinge.mean()
        self.active = (hinge.detach() > 0).float().mean()
        at_margin = (loss.detach() - self.margin).abs() < 0.01 * self.margin
        self.collapsed = torch.maximum(collapsed(features), (at_margin & (self.active == 1)).float())
        return loss


class CenterLoss(nn.Module):
    """Squared distance of each feature to the center of its own identity, clamped to [1e-12, 1e12].

    Wen et al., A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV 2016. The paper sums half the
    square over the batch, and moves a center by alpha * n / (1 + n) of the way to the mean of its n images. Here, as in
    the original, the centers have their own optimizer: SGD with learning rate 0.5 moves them by n / B of that way.

    Args:
        num_classes: number of training identities.
        feat_dim: length of a feature, D.

    Attributes:
        centers: parameter (num_classes, feat_dim), standard normal, drawn from torch's global CPU generator, so that it
            depends on the seed but not on the device.
    """

    def __init__(self, num_classes: int, feat_dim: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(num_classes, feat_dim, device='cpu'))

    def forward(self, features: Tensor, pids: Tensor) -> Tensor:
        """Mean over the batch, 0-dim, of features (B, feat_dim) and pids (B,) in 0..num_classes-1.

        The gradient of a center is the sum of 2 (center - feature) / B over its images in the batch.

        Raises:
            ValueError: the shapes do not fit.
        """
        _check_shapes(features, pids, self.centers.shape[1])
        own_centers = F.embedding(pids, self.centers)  # (B, feat_dim); centers[pids] would accept -1
        squares = _squared_distance(_float(features), own_centers)  # (B,)
        return squares.clamp(SMALLEST_SQUARE, LARGEST_SQUARE).mean()


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """(B, D) and (B, D) -> (B,), row by row."""
    return (a - b).square().sum(dim=1)


def _float(x: Tensor) -> Tensor:
    """Convert to at least float32: with 8 bits of precision, distances that differ by the margin would be equal."""
    return x if x.dtype == torch.float64 else x.float()


def _check_shapes(x: Tensor, pids: Tensor, width: int) -> None:
    if x.ndim != 2 or x.shape[1] != width or pids.shape != x.shape[:1] or not len(pids):
        raise ValueError(f'expected (B, {width}) and (B,), B >= 1, got {tuple(x.shape)} and {tuple(pids.shape)}')
