"""Train an image re-ID model with cross entropy over the training identities, labels smoothed.

An epoch is every training image once. At test the classifier is left away and the pooled feature describes a person.
"""

from torch.optim import Adam
from torch.optim.lr_scheduler import StepLR

import arguments
import data_manager
import models
from dataset_loader import ImageDataset, train_loader
from evaluation import Test
from losses import CrossEntropyLabelSmooth
from runtime import launch
from runtime.checkpoint import Checkpoint
from runtime.meters import LossMeter
from samplers import RandomSampler
from transforms import TrainTransform

parser = arguments.parser(__doc__, dataset='market1501', test_batch=32)
parser.set_defaults(max_epoch=60, stepsize=20)


def main(args):
    run = launch.start(args.run)

    dataset = data_manager.init_dataset(args.dataset, args.data_dir)
    sampler = RandomSampler(dataset.train, args.train_batch, args.seed)
    trainloader = train_loader(ImageDataset(dataset.train), sampler, args.data, run)
    augment = TrainTransform(args.height, args.width)

    model = models.init_model(args.arch, dataset.num_train_pids, loss={'xent'}, pretrained=args.pretrained)
    model = run.place(model)
    criterion_xent = CrossEntropyLabelSmooth(dataset.num_train_pids)
    optimizer = Adam(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    scheduler = StepLR(optimizer, args.stepsize, args.gamma)

    test = Test(dataset, args.test, run)
    checkpoint = Checkpoint(dataset, args.save, run, model=model, optimizer=optimizer, scheduler=scheduler)
    if args.evaluate:
        return test(model)

    replica = run.replicate(model)
    meter = LossMeter(args.show)
    for epoch in checkpoint.epochs(args.max_epoch):
        batches = checkpoint.batches(trainloader, epoch, meter)
        train(batches, replica, augment, criterion_xent, optimizer, meter, run)
        scheduler.step()
        if test.is_due(epoch):
            checkpoint.tested(epoch, test(model))


def train(batches, model, augment, criterion_xent, optimizer, meter, run):
    model.train()
    for imgs, pids, draws in batches:
        with run.autocast():
            logits = model(augment(imgs, draws))  # (B, num_train_pids)
        loss = criterion_xent(logits.float(), pids)
        optimizer.zero_grad()
        loss.backward()
        run.guard(loss, optimizer)  # a loss that is not finite changes nothing
        optimizer.step()
        meter.update(loss=loss)


if __name__ == '__main__':
    launch.main(main, parser)
