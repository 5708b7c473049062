"""Train an image re-ID model with cross entropy and center loss (Wen et al., ECCV 2016).

Center loss pulls the feature of an image towards the center of its identity. The centers are learned together with the
model, by SGD with a separate learning rate. Every training image is used once per epoch.
"""

from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

import arguments
import data_manager
import models
import weights
from dataset_loader import ImageDataset, TrainLoader
from evaluation import Test
from losses import CenterLoss, CrossEntropyLabelSmooth, collapsed
from runtime import launch
from runtime.checkpoint import Checkpoint
from runtime.device import Run
from runtime.meters import LossMeter
from samplers import RandomSampler
from transforms import TrainTransform

parser = arguments.parser(__doc__, dataset='market1501', test_batch=32)
parser.set_defaults(max_epoch=60, stepsize=20)
parser.add_argument('--lr-cent', type=arguments.positive_float, default=0.5, help='learning rate of the centers')
parser.add_argument('--weight-cent', type=arguments.positive_float, default=0.0005, help='weight of the center loss')


def main(args: arguments.Arguments, run: Run) -> None:
    dataset = data_manager.init_datasets(args.data)  # its .train is for training, each of its .targets for tests
    size = args.height, args.width
    model = models.init_model(args.arch, dataset.num_train_pids, loss={'xent', 'cent'}, size=size)
    weights.pretrain(model, args.pretrained)
    model = run.place(model)

    test = Test(dataset, args.test, run)
    if args.evaluate:  # needs neither the training set nor what follows
        test(Checkpoint(dataset, args.save, run, model=model).model)  # the model of --resume
        return

    sampler = RandomSampler(dataset.train, args.train_batch, args.seed, dataset.groups(args.balance))
    trainloader = TrainLoader(ImageDataset(dataset.train), sampler, args.data, run)
    augment = TrainTransform(
        *size, model.normalisation, args.interpolation or model.interpolation, args.padding, args.random_erasing
    )
    criterion_xent = CrossEntropyLabelSmooth(dataset.num_train_pids)
    criterion_cent = run.place(CenterLoss(dataset.num_train_pids, model.feat_dim))
    optimizer = Adam(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    optimizer_cent = SGD(criterion_cent.parameters(), args.lr_cent, fused=True)
    scheduler = StepLR(optimizer, args.stepsize, args.gamma)
    checkpoint = Checkpoint(
        dataset,
        args.save,
        run,
        model=model,
        criterion_cent=criterion_cent,
        optimizer=optimizer,
        optimizer_cent=optimizer_cent,
        scheduler=scheduler,
    )

    replica, replica_cent = run.replicate(model), run.replicate(criterion_cent)
    meter = LossMeter(args.show, run, optimizer)
    for epoch in checkpoint.epochs(args.max_epoch):
        replica.train()
        for imgs, pids, draws in meter.watch(trainloader, epoch, checkpoint.start_batch):  # B images, (B,), (B, DRAWS)
            with run.autocast():
                logits, features = replica(augment(imgs, draws))  # (B, num_train_pids), (B, feat_dim)
            xent = criterion_xent(logits.float(), pids)
            cent = replica_cent(features.float(), pids)
            loss = xent + args.weight_cent * cent
            optimizer.zero_grad()
            optimizer_cent.zero_grad()
            loss.backward()
            for param in criterion_cent.parameters():
                param.grad /= args.weight_cent  # undoes --weight-cent, which is for the features' gradient
            run.skip_unless_finite(loss, optimizer, optimizer_cent)
            optimizer.step()
            optimizer_cent.step()
            meter.update(loss=loss, xent=xent, cent=cent, collapsed=collapsed(features))
            checkpoint.after_step(epoch, meter)  # saves regularly, and stops the run on a signal
        scheduler.step()
        if test.is_due(epoch):
            checkpoint.tested(epoch, test(model), meter)
    checkpoint.last_test(test, meter)  # with --validate: tests best_model.pth.tar on the test set, once


if __name__ == '__main__':
    launch.main(main, parser)
