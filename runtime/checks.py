"""Checks of the options before anything starts; the files of an earlier run are not changed."""

import argparse
import importlib.util
import math
import os
import sys
import tempfile
from pathlib import Path

import torch

import data_manager
import models
from extraction import compiling
from files.kinds import not_a_file
from runtime.errors import UserError, plain
from runtime.processes import of_environment


def check(kind: str, args: argparse.Namespace) -> None:
    """Raise UserError for the first mistake; `kind` is 'image' or 'video', the items of the script."""
    check_names(kind, args)
    check_batch(args)
    check_test(args)
    check_compile(args)
    check_resume(args)
    check_folder(args)


def check_names(kind: str, args: argparse.Namespace) -> None:
    trained, tested = data_manager.names_of(args.dataset), data_manager.names_of(args.targets or args.dataset)
    for flag, names in (('-d', trained), ('-t', tested)):
        if flag == '-d' and args.evaluate and args.targets:  # -d is not read in this case
            continue
        for name in names if flag == '-d' or args.targets else ():
            check_name(kind, flag, name)
            if names.count(name) > 1:
                raise UserError(f'{flag}: {plain(name, 500)} is given twice; give each data set once')
    if args.validate == 1:
        raise UserError('--validate 1: no person would be left to train on; give a share below 1')
    if args.select and args.validate and not args.evaluate:
        raise UserError(
            '--select does not work with --validate, whose held-out persons choose best_model.pth.tar: remove one of '
            'the two'
        )
    if args.select and args.select not in tested:
        raise UserError(
            f'--select {plain(args.select, 500)}: it is not tested; choose one of '
            f'{", ".join(plain(name, 500) for name in tested)}'
        )
    try:
        smallest = models.network_of(args.arch, (args.height, args.width)).smallest
    except UserError as mistake:
        raise UserError(f'-a {args.arch}: {mistake}') from None
    if min(args.height, args.width) < smallest:
        raise UserError(
            f'--height {args.height} --width {args.width} is too small: -a {args.arch} needs at least {smallest} '
            f'pixels in each dimension'
        )
    if getattr(args, 'padding', 0) >= min(args.height, args.width):  # the crops would be black
        raise UserError(f'--padding {args.padding} is too large for --height {args.height} --width {args.width}')
    if args.pretrained not in ('imagenet', 'none') and not os.path.isfile(args.pretrained):
        reason = not_a_file(args.pretrained)
        reason = f' {reason}' if reason else ': no such file; give a path, imagenet or none'
        raise UserError(f'--pretrained {args.pretrained}{reason}')


def check_name(kind: str, flag: str, name: str) -> None:
    """Check that a data set of this name exists, and that its items (images or tracklets) are those of the script."""
    names, named = f'{", ".join(data_manager.get_names(kind))}, {data_manager.OWN_NAMES}', plain(name, 500)
    try:
        given = data_manager.kind_of(name)
    except UserError as mistake:
        raise UserError(f'{flag} {named}: {mistake}') from None
    if given and given != kind:
        expected, contained = ('images', 'tracklets') if kind == 'image' else ('tracklets', 'images')
        script = Path(sys.argv[0]).name
        other = script.replace('img', 'vid') if kind == 'image' else script.replace('vid', 'img')
        does = 'trains on' if flag == '-d' else 'tests'
        raise UserError(
            f'{flag} {named} contains {contained}, but {script} {does} {expected}: choose one of {names}, '
            f'or run {other if other != script else "a script for " + contained}'
        )
    if not given:
        raise UserError(f'{flag} {named}: no such data set; choose one of {names}')


def check_batch(args: argparse.Namespace) -> None:
    """Check that a batch contains whole identities, and that it can be divided equally among the processes, with at
    least 2 images each, for BatchNorm.
    """
    if args.evaluate:
        return
    if args.train_batch < 2:
        raise UserError(f'--train-batch {args.train_batch}: a batch needs at least 2 images, for BatchNorm')
    instances = getattr(args, 'num_instances', 1)  # K of P x K batches
    if args.train_batch % instances:
        below = max(args.train_batch // instances, 2) * instances
        raise UserError(
            f'--train-batch {args.train_batch} is not a multiple of --num-instances {instances} (P identities x K '
            f'images): use {below} or {below + instances}'
        )
    processes = number_of_processes(args)
    if processes == 1 or (args.train_batch % processes == 0 and args.train_batch >= 2 * processes):
        return
    step = math.lcm(processes, instances)
    least = -(-2 * processes // step) * step
    below = max(args.train_batch // step * step, least)
    raise UserError(
        f'--train-batch {args.train_batch} cannot be split evenly among {processes} processes with at least 2 images '
        f'each: use {below} or {below + step}'
    )


def number_of_processes(args: argparse.Namespace) -> int:
    """The number of processes that torchrun has started, or that this command will start."""
    ours = of_environment()
    listed = 1 if args.use_cpu else args.gpu_devices.count(',') + 1
    return ours.world_size if ours.started else listed


def check_test(args: argparse.Namespace) -> None:
    if args.any_camera and args.multi_query:
        raise UserError(
            '--any-camera does not work with --multi-query: averaged images in the gallery would count as matches; '
            'remove one of the two'
        )


def check_compile(args: argparse.Namespace) -> None:
    """Check what --compile needs on this machine, as it would fail only at the first step, after the data are read.

    --compile in training without a GPU is refused later (`runtime.device`). A test is compiled only on a CPU.
    """
    if args.compile and not args.evaluate:
        check_training(args)
    elif args.compile and (args.use_cpu or not torch.cuda.is_available()):
        compiling.check_compiler(*compiling.CPP)


def check_training(args: argparse.Namespace) -> None:
    """Check what training with --compile needs."""
    processes = number_of_processes(args)
    if args.sync_bn:
        raise UserError(
            '--compile does not work with --sync-bn, which breaks the compiled graph: remove one of the two'
        )
    if args.use_cpu or not torch.cuda.is_available():
        return
    major, minor = (int(number) for number in torch.__version__.split('.')[:2])
    if processes > 1 and (major, minor) < (2, 8):
        raise UserError(
            f'--compile with several GPUs needs PyTorch 2.8 or newer, and {torch.__version__} is installed: upgrade '
            f'it, use one GPU, or remove --compile'
        )
    if not importlib.util.find_spec('triton'):
        raise UserError('--compile needs triton, which is not installed: pip install triton, or remove --compile')
    compiling.check_compiler(*compiling.C)


def check_resume(args: argparse.Namespace) -> None:
    """Check that there is a file to resume and an epoch to train, and that no options contradict each other."""
    processes = of_environment()
    if args.resume and not os.path.isfile(args.resume):
        reason = not_a_file(args.resume)
        raise UserError(f'--resume {args.resume} {reason}' if reason else f'--resume {args.resume}: no such file')
    restarts = args.max_restarts or processes.may_restart  # by us, or by torchrun
    if args.overwrite and (args.auto_resume or restarts) and not args.evaluate:
        other = '--auto-resume' if args.auto_resume else '--max-restarts'
        raise UserError(f'--overwrite removes what {other} would continue from: give only one of the two')
    if args.evaluate and args.auto_resume and not (args.resume or processes.restarts):
        raise UserError('--evaluate tests the file given by --resume: remove --auto-resume')
    if args.resume_weights_only and not (args.resume or args.evaluate):
        raise UserError('--resume-weights-only needs --resume PATH, the file to load the weights from')
    if args.assume and not args.resume:
        raise UserError('--assume needs --resume PATH, the file that does not record it')
    if args.start_epoch >= args.max_epoch and not args.evaluate:
        raise UserError(f'--start-epoch {args.start_epoch} leaves no epoch to train: --max-epoch is {args.max_epoch}')


def check_folder(args: argparse.Namespace) -> None:
    """Check that --save-dir is writable and contains no run with which this one would be mixed."""
    save_dir = Path(args.save_dir)
    held = sorted(save_dir.glob('*.pth.tar')) if os.path.isdir(save_dir) else []  # Path.is_dir raises if it is too long
    resumes = args.resume and not args.resume_weights_only
    if held and not (args.evaluate or args.overwrite or args.auto_resume or resumes):
        raise UserError(
            f'--save-dir {save_dir} contains the checkpoints of a run ({held[0].name}): continue it with '
            '--auto-resume, remove them with --overwrite, or choose another folder'
        )
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=save_dir):
            pass
    except OSError as problem:
        reason = os.strerror(problem.errno or 0)
        raise UserError(f'--save-dir {save_dir}: cannot be written to ({reason}); choose another folder') from problem
    for folder in (save_dir / 'features', save_dir / '.features') if args.save_features else ():
        if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise UserError(f'--save-features: {folder} cannot be written to; remove it, or choose another --save-dir')
