"""Train a face embedding with ArcFace on a set that pre_process.py (or InsightFace) prepared.

    python train.py                                    # r50 on data/faces_webface_112x112
    python train.py --network mobilefacenet --batch-size 128 --lr 0.025        # on a laptop
    python train.py --init base.pt --lr 0.01           # fine-tune another checkpoint
    python train.py --resume                           # resume the newest run
    torchrun --nproc-per-node=4 train.py               # on the four GPUs of a machine
    tensorboard --logdir=runs                          # watch

It prints what it trains on, a progress bar and then one line per epoch:

    epoch 1/32  loss 18.402  accuracy 12.31%  valid loss 15.210 ...

and writes runs/<time>-<network>-s<seed>/last.pt (every epoch and every quarter of an hour; the
one before stays as last-1.pt), best.pt (best on the held-out images) and TensorBoard's events, and
at the end the curves images/train_loss.png, train_acc.png, valid_loss.png and valid_acc.png.
Ctrl-C stops after the current step and saves it in last.pt. However a run ended, --resume
continues it to exactly the weights and numbers of an uninterrupted run.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from config import Config, checkpoint_interval, parse_args
from utils import UserError, exit_on_user_error

if TYPE_CHECKING:
    import torch

    from data_gen import ImageStore, Split
    from training.engine import Engine
    from training.run import Run


@exit_on_user_error
def main(cfg: Config) -> None:
    """Train one run from its beginning or from where it stopped."""
    # Imported here, so that --help answers at once.
    from distributed.process_group import process_group
    from utils import keep_freed_memory

    keep_freed_memory()
    with process_group(cfg.device):
        if cfg.resume:
            resume_run(cfg)
        else:
            start_run(cfg)


def start_run(cfg: Config) -> None:
    """Train a new run."""
    from distributed.collectives import run_on_all, run_on_main
    from training.fine_tuning import initialise, open_base
    from training.resume import own_folder

    network = {"network": cfg.network, "use_se": cfg.use_se, "emb_size": cfg.emb_size}
    base = run_on_all(lambda: open_base(cfg.init, network, cfg.given))
    cfg = dataclasses.replace(cfg, **base.settings)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{cfg.network}-s{cfg.seed}"
    folder = run_on_main(lambda: Path(cfg.runs_dir, name))
    run = build_run(cfg, folder)
    initialise(run, base.weights)
    del base  # the run has copies
    with own_folder(folder, create=True):
        fit(run, cfg, resumed=False)


def resume_run(cfg: Config) -> None:
    """Continue a run from its newest checkpoint, or from the one that is named."""
    from distributed.collectives import run_on_all, run_on_main
    from training.resume import find_run, open_checkpoint, own_folder, resumed_config
    from training.run_report import report_result

    folder = run_on_main(lambda: find_run(cfg.resume, cfg.runs_dir))
    with own_folder(folder):
        checkpoint, path = open_checkpoint(cfg.resume, folder)
        cfg = resumed_config(cfg, checkpoint["config"], folder)
        if checkpoint["epoch"] < cfg.epochs:
            run = build_run(cfg, folder)
            run_on_all(lambda: run.load_state_dict(checkpoint, path))
            del checkpoint  # the run has copies
            fit(run, cfg, resumed=True)
            return
    print(f"{folder} has its {checkpoint['epoch']} epochs; for more of them give --epochs.")
    history, best, steps = (checkpoint[key] for key in ("history", "best", "steps"))
    report_result(folder, Path(cfg.images_dir), history, best, steps)


def build_run(cfg: Config, folder: Path) -> Run:
    """Open the training set and build what is trained on it; nothing is trained yet."""
    import functools

    import torch

    from data_gen import steps_per_epoch
    from distributed.collectives import run_on_all
    from distributed.process_group import local_device, seed_per_rank
    from training.data_checks import check_training_set
    from training.dataset import cache_images
    from training.engine import choose_compile
    from training.gpu_memory import choose_training_cache
    from training.run import Run
    from training.schedule import frozen_epochs, learning_rate
    from utils import seed_everything

    device = run_on_all(lambda: local_device(cfg.device))
    # What autocast leaves in float32 uses a GPU's tensor cores; evaluation is exact by itself.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    # Each process opens and decodes for itself; if one of them fails, all end.
    store, split = run_on_all(lambda: open_data(cfg, device))
    slice_size = store.slice_size(cfg.batch_size)

    def build(compiled: str) -> Engine:
        uses = dataclasses.replace(cfg, compile=compiled)
        return build_engine(uses, split.num_classes, device, slice_size)

    at_a_time = -(-slice_size // cfg.accumulate)
    cache = choose_training_cache(cfg.cache, store, lambda: build("off"), at_a_time)
    positions = cache_images(store, split.train, cache)
    seed_everything(cfg.seed)
    torch.backends.cudnn.benchmark = True  # every training step has the same shapes
    steps = steps_per_epoch(len(positions), cfg.batch_size) * cfg.epochs
    compiled = choose_compile(cfg.compile, device, steps, demanded="compile" in cfg.given)
    cfg = dataclasses.replace(cfg, compile=compiled)
    # How train.py was called does not make a run what it is.
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("given", "resume")}
    schedule = {"lr": cfg.lr, "epochs": cfg.epochs, "schedule": cfg.schedule}
    schedule |= {"milestones": cfg.milestones, "warmup_epochs": cfg.warmup_epochs}

    run = Run(
        engine=build(cfg.compile),
        store=store,
        split=split,
        folder=folder,
        learning_rate_at=functools.partial(learning_rate, **schedule),
        settings=settings,
        epochs=cfg.epochs,
        batch_size=cfg.batch_size,
        eval_batch=cfg.eval_batch,
        seed=cfg.seed,
        flip=cfg.flip,
        augment=cfg.augment,
        log_every=cfg.log_every,
        checkpoint_every=checkpoint_interval(cfg.checkpoint_every),
        frozen_epochs=frozen_epochs(cfg.freeze_epochs, cfg.lr * cfg.backbone_lr_factor),
    )
    seed_per_rank(cfg.seed, 0)  # after the network is built: its weights are the same everywhere
    run_on_all(lambda: check_training_set(store, positions, split.num_classes, cfg.seed))
    return run


def open_data(cfg: Config, device: torch.device) -> tuple[ImageStore, Split]:
    """The images to train on, and their split into training and validation."""
    from training.dataset import DEFAULT_SET, open_training_set

    return open_training_set(
        Path(cfg.train_set or Path(cfg.data_dir, DEFAULT_SET)),
        device,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        valid_fraction=cfg.valid_fraction,
        max_classes=cfg.max_classes,
        keep=cfg.keep,
        hold_out=cfg.hold_out,
        workers=cfg.workers,
    )


def build_engine(
    cfg: Config, num_classes: int, device: torch.device, slice_size: int | None = None
) -> Engine:
    """The network, its head, the loss and the optimiser that the settings ask for.

    `slice_size` is the size of the largest slice of a batch, by default an even one. Raises
    UserError where settings do not fit together.
    """
    from torch import nn

    from distributed.data_parallel import convert_sync_batch_norm
    from distributed.process_group import world_size
    from focal_loss import FocalLoss
    from heads.registry import HEADS, build_head
    from models import build_model
    from training.activation_checkpointing import enable_activation_checkpointing
    from training.cpu_kernels import use_fast_cpu_kernels
    from training.engine import Engine, build_optimizer, check_batch_size
    from utils import autocast_dtype

    check_batch_size(cfg.batch_size, cfg.accumulate)
    if cfg.focal_loss and not HEADS[cfg.margin].is_softmax:
        raise UserError(
            f"--focal-loss weights a softmax, and --margin {cfg.margin} has a loss of its own; "
            "leave one of them out."
        )
    network_options = {"dropout": cfg.dropout, "use_se": cfg.use_se, "zero_init": cfg.zero_init}
    try:
        model = build_model(cfg.network, cfg.emb_size, **network_options)
        if device.type == "cpu":
            use_fast_cpu_kernels(model)
        if cfg.checkpoint_activations:
            enable_activation_checkpointing(model)
        if cfg.sync_bn:
            model = convert_sync_batch_norm(model, device)
        model = model.to(device)
        head = build_head(
            cfg.margin,
            cfg.emb_size,
            num_classes,
            margin_s=cfg.margin_s,
            margin_m=cfg.margin_m,
            options=cfg.margin_options,
            batch_size=cfg.batch_size,
            sample_rate=cfg.sample_rate,
            seed=cfg.seed,
        ).to(device)
    except ValueError as error:  # settings that do not fit together
        raise UserError(str(error)) from None
    options = {"decay_bn": cfg.decay_bn, "backbone_lr_factor": cfg.backbone_lr_factor}
    optimizer = build_optimizer(model, head, cfg.lr, cfg.momentum, cfg.weight_decay, **options)
    return Engine(
        model,
        head,
        FocalLoss(cfg.focal_loss) if cfg.focal_loss else nn.CrossEntropyLoss(),
        optimizer,
        device=device,
        slice_size=slice_size or -(-cfg.batch_size // world_size()),
        accumulate=cfg.accumulate,
        clip_norm=cfg.clip_norm,
        ema_decay=cfg.ema,
        amp=autocast_dtype(device) if cfg.amp else None,
        compiled=cfg.compile == "on",
    )


def fit(run: Run, cfg: Config, resumed: bool) -> None:
    """Train to the last epoch, evaluating and saving after each, and report the result."""
    from distributed.collectives import any_rank
    from evaluation.shared_set import open_lfw
    from training.epochs import finish_epoch
    from training.event_log import open_log
    from training.interruptions import saved_on_exit, stop_on_signals
    from training.run_report import print_header, report_result, settings_table

    options = {"batch": run.eval_batch, "device": run.device}
    lfw = open_lfw(cfg.lfw, cfg.data_dir, cfg.train_set, cfg.workers, **options)
    print_header(run)
    with stop_on_signals(run), open_log(run.folder, run.global_step, run.step > 0) as log:
        if not resumed:
            log.add_text("config", settings_table(run.settings))
            run.save_last(log)  # from here on, the run can be resumed
        with saved_on_exit(run, log):
            while run.epoch < run.epochs:
                loss, accuracy = run.train_one_epoch(log)
                finish_epoch(run, log, lfw, loss, accuracy)
                if any_rank(run.stop_requested)[0]:
                    raise KeyboardInterrupt
    report_result(run.folder, Path(cfg.images_dir), run.history, run.best, run.steps)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "train", doc=__doc__))
