"""Train a video re-ID model with cross entropy and the batch-hard triplet loss (Hermans et al., arXiv:1703.07737).

The network is trained on single frames: a batch contains P identities with K frames each, and an epoch contains
every identity once. At test the features of --seq-len frames are pooled into one feature of the tracklet.
"""

from torch.optim import Adam
from torch.optim.lr_scheduler import StepLR

import arguments
import data_manager
import models
import weights
from dataset_loader import ImageDataset, TrainLoader
from evaluation import Test
from losses import CrossEntropyLabelSmooth, TripletLoss
from runtime import launch
from runtime.checkpoint import Checkpoint
from runtime.device import Run
from runtime.meters import LossMeter
from samplers import RandomIdentitySampler
from transforms import TrainTransform

parser = arguments.parser(__doc__, dataset='mars', test_batch=5)
parser.set_defaults(max_epoch=500, stepsize=200)
parser.add_argument('--margin', type=arguments.nonnegative_float, default=0.3, help='margin of the triplet loss')
parser.add_argument('--num-instances', type=arguments.positive_int, default=4, help='K, images per identity in a batch')


def main(args: arguments.Arguments, run: Run) -> None:
    dataset = data_manager.init_datasets(args.data)  # its .train is for training, each of its .targets for tests
    size = args.height, args.width
    model = models.init_model(args.arch, dataset.num_train_pids, loss={'xent', 'htri'}, size=size)
    weights.pretrain(model, args.pretrained)
    model = run.place(model)

    test = Test(dataset, args.test, run)
    if args.evaluate:  # needs neither the training set nor what follows
        test(Checkpoint(dataset, args.save, run, model=model).model)  # the model of --resume
        return

    frames = [(path, pid, camid) for paths, pid, camid in dataset.train for path in paths]  # each a training image
    groups = dataset.groups(args.balance)
    sampler = RandomIdentitySampler(frames, args.num_instances, args.train_batch, args.seed, groups)
    trainloader = TrainLoader(ImageDataset(frames), sampler, args.data, run)
    augment = TrainTransform(
        *size, model.normalisation, args.interpolation or model.interpolation, args.padding, args.random_erasing
    )
    criterion_xent = CrossEntropyLabelSmooth(dataset.num_train_pids)
    criterion_htri = TripletLoss(args.margin)
    optimizer = Adam(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    scheduler = StepLR(optimizer, args.stepsize, args.gamma)
    checkpoint = Checkpoint(dataset, args.save, run, model=model, optimizer=optimizer, scheduler=scheduler)

    replica = run.replicate(model)
    meter = LossMeter(args.show, run, optimizer)
    for epoch in checkpoint.epochs(args.max_epoch):
        replica.train()
        for imgs, pids, draws in meter.watch(trainloader, epoch, checkpoint.start_batch):  # B images, (B,), (B, DRAWS)
            with run.autocast():
                logits, features = replica(augment(imgs, draws))  # (B, num_train_pids), (B, feat_dim)
            xent = criterion_xent(logits.float(), pids)
            htri = criterion_htri(*run.gather(features.float(), pids))  # mines the whole batch
            loss = xent + htri
            optimizer.zero_grad()
            loss.backward()
            run.skip_unless_finite(loss, optimizer)
            optimizer.step()
            meter.update(
                loss=loss, xent=xent, htri=htri, active=criterion_htri.active, collapsed=criterion_htri.collapsed
            )
            checkpoint.after_step(epoch, meter)  # saves regularly, and stops the run on a signal
        scheduler.step()
        if test.is_due(epoch):
            checkpoint.tested(epoch, test(model), meter)
    checkpoint.last_test(test, meter)  # with --validate: tests best_model.pth.tar on the test set, once


if __name__ == '__main__':
    launch.main(main, parser)
