"""Train an image re-ID model with the recipe of Bag of Tricks (Luo et al., CVPRW 2019, arXiv:1903.07071).

Cross entropy with label smoothing, batch-hard triplet loss and center loss; BNNeck, last stride 1, random erasing, and
a warm-up of the learning rate. A batch contains P identities with K images each, and an epoch contains all images. The
triplet and center loss use the feature before the neck; the classifier and the test, by cosine distance, use that
behind it.
"""

from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

import arguments
import data_manager
import models
import weights
from dataset_loader import ImageDataset, train_loader
from losses import CenterLoss, CrossEntropyLabelSmooth, TripletLoss
from runtime.device import Run
from samplers import AllImagesSampler
from transforms import TrainTransform

parser = arguments.parser(__doc__, dataset='market1501', test_batch=32, without={'stepsize'})
parser.set_defaults(train_batch=64, max_epoch=120, lr=0.00035, random_erasing=0.5, padding=10, distance='cosine')
parser.add_argument('--num-instances', type=arguments.positive_int, default=4, help='K, images per identity in a batch')
parser.add_argument('--margin', type=arguments.nonnegative_float, default=0.3, help='margin of the triplet loss')
parser.add_argument('--weight-cent', type=arguments.positive_float, default=0.0005, help='weight of the center loss')
parser.add_argument('--lr-cent', type=arguments.positive_float, default=0.5, help='learning rate of the centers')
parser.add_argument('--warmup', type=arguments.nonnegative_int, default=10, help='epochs until --lr is reached')
parser.add_argument('--decays', type=arguments.positive_int, nargs='+', default=[40, 70], help='epochs of the decays')
parser.require(
    lambda args: args.train_batch % args.num_instances == 0,
    '--train-batch {train_batch} is not a multiple of --num-instances {num_instances} (P identities x K images)',
)


def main(args: arguments.Arguments, run: Run) -> None:
    dataset = data_manager.init_dataset(args.dataset, args.data_dir)
    sampler = AllImagesSampler(dataset.train, args.num_instances, args.train_batch, args.seed)
    trainloader = train_loader(ImageDataset(dataset.train), sampler, args.data, run)

    num_classes, size, loss = dataset.num_train_pids, (args.height, args.width), {'xent', 'htri', 'cent'}
    model = models.init_model(args.arch, num_classes, loss, last_stride=1, neck=True, size=size)
    weights.pretrain(model, args.pretrained)
    model = run.place(model)
    augment = TrainTransform(
        *size, model.normalisation, args.interpolation, padding=args.padding, random_erasing=args.random_erasing
    )
    criterion_xent = CrossEntropyLabelSmooth(num_classes)
    criterion_htri = TripletLoss(args.margin)
    criterion_cent = run.place(CenterLoss(num_classes, model.feat_dim))
    optimizer = Adam(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    optimizer_cent = SGD(criterion_cent.parameters(), args.lr_cent, fused=True)
    scheduler = LambdaLR(  # of epochs from 0: linear to --lr, then divided by 10 at each of --decays
        optimizer,
        lambda epoch: min((epoch + 1) / (args.warmup or 1), 1) * args.gamma ** sum(epoch >= at for at in args.decays),
    )
