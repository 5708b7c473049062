"""Train an image re-ID model with the recipe of Bag of Tricks (Luo et al., CVPRW 2019, arXiv:1903.07071).

Cross entropy with label smoothing, batch-hard triplet loss and center loss; BNNeck, last stride 1, random erasing, and
a warm-up of the learning rate. A batch contains P identities with K images each, an epoch all images but a remainder.
The triplet and center loss use the feature before the neck; the classifier and the test, with cosine distance, use the
feature behind it.
"""

from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

import arguments
import data_manager
import models
import weights
from dataset_loader import ImageDataset, TrainLoader
from evaluation import Test
from losses import CenterLoss, CrossEntropyLabelSmooth, TripletLoss
from runtime import launch
from runtime.checkpoint import Checkpoint
from runtime.device import Run
from runtime.meters import LossMeter
from samplers import AllImagesSampler
from transforms import TrainTransform

parser = arguments.parser(__doc__, dataset='market1501', test_batch=32, without={'stepsize'})
parser.set_defaults(train_batch=64, max_epoch=120, lr=0.00035, random_erasing=0.5, padding=10, distance='cosine')
parser.add_argument('--num-instances', type=arguments.positive_int, default=4, help='K, images per identity in a batch')
parser.add_argument('--margin', type=arguments.nonnegative_float, default=0.3, help='margin of the triplet loss')
parser.add_argument('--weight-cent', type=arguments.positive_float, default=0.0005, help='weight of the center loss')
parser.add_argument('--lr-cent', type=arguments.positive_float, default=0.5, help='learning rate of the centers')
parser.add_argument('--warmup', type=arguments.nonnegative_int, default=10, help='epochs of the linear rise to --lr')
parser.add_argument('--decays', type=arguments.positive_int, nargs='+', default=[40, 70], help='lr decays after these')


def main(args: arguments.Arguments, run: Run) -> None:
    dataset = data_manager.init_datasets(args.data)  # its .train is for training, each of its .targets for tests
    num_classes, size, loss = dataset.num_train_pids, (args.height, args.width), {'xent', 'htri', 'cent'}
    model = models.init_model(args.arch, num_classes, loss, last_stride=1, neck=True, size=size)
    weights.pretrain(model, args.pretrained)
    model = run.place(model)

    test = Test(dataset, args.test, run)
    if args.evaluate:  # needs neither the training set nor what follows
        test(Checkpoint(dataset, args.save, run, model=model).model)  # the model of --resume
        return

    groups = dataset.groups(args.balance)
    sampler = AllImagesSampler(dataset.train, args.num_instances, args.train_batch, args.seed, groups)
    trainloader = TrainLoader(ImageDataset(dataset.train), sampler, args.data, run)
    augment = TrainTransform(
        *size, model.normalisation, args.interpolation or model.interpolation, args.padding, args.random_erasing
    )
    criterion_xent, criterion_htri = CrossEntropyLabelSmooth(num_classes), TripletLoss(args.margin)
    criterion_cent = run.place(CenterLoss(num_classes, model.feat_dim))
    optimizer = Adam(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    optimizer_cent = SGD(criterion_cent.parameters(), args.lr_cent, fused=True)
    scheduler = LambdaLR(  # epochs from 0: a linear warm-up to --lr, then a factor of --gamma at each of --decays
        optimizer,
        lambda epoch: min((epoch + 1) / (args.warmup or 1), 1) * args.gamma ** sum(epoch >= at for at in args.decays),
    )
    checkpoint = Checkpoint(
        dataset, args.save, run, model=model, optimizer=optimizer, scheduler=scheduler,
        criterion_cent=criterion_cent, optimizer_cent=optimizer_cent,
    )  # fmt: skip

    replica, replica_cent = run.replicate(model), run.replicate(criterion_cent)
    meter = LossMeter(args.show, run, optimizer)
    for epoch in checkpoint.epochs(args.max_epoch):
        replica.train()
        for imgs, pids, draws in meter.watch(trainloader, epoch, checkpoint.start_batch):  # B images, (B,), (B, DRAWS)
            with run.autocast():
                logits, features = replica(augment(imgs, draws))  # (B, num_train_pids), (B, feat_dim) before the neck
            xent = criterion_xent(logits.float(), pids)
            htri = criterion_htri(*run.gather(features.float(), pids))  # mines the whole batch
            cent = replica_cent(features.float(), pids)
            loss = xent + htri + args.weight_cent * cent
            optimizer.zero_grad()
            optimizer_cent.zero_grad()
            loss.backward()
            for param in criterion_cent.parameters():
                param.grad /= args.weight_cent  # undoes --weight-cent, which is for the features' gradient
            run.skip_unless_finite(loss, optimizer, optimizer_cent)
            optimizer.step()
            optimizer_cent.step()
            active, collapsed = criterion_htri.active, criterion_htri.collapsed
            meter.update(loss=loss, xent=xent, htri=htri, cent=cent, active=active, collapsed=collapsed)
            checkpoint.after_step(epoch, meter)  # saves regularly, and stops the run on a signal
        scheduler.step()
        if test.is_due(epoch):
            checkpoint.tested(epoch, test(model), meter)
    checkpoint.last_test(test, meter)  # with --validate: tests best_model.pth.tar on the test set, once


if __name__ == '__main__':
    launch.main(main, parser)
