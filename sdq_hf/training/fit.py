"""The training loop that the teacher and the quantized student share, on Accelerate."""

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import DataLoaderShard
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..quantizers.positive import floors, set_floors
from ..writing import save_tensors, write_beside
from .checkpoints import Checkpoints, load_tensors
from .evaluation import evaluate
from .interrupt import Interrupt
from .loaders import endless
from .losses import DivergedError
from .optim import OptimizerArguments, create_optimizer, create_scheduler
from .progress import Progress

# (images, labels, progress of the training from 0 to 1) -> loss
LossFunction = Callable[[nn.Module, Tensor, Tensor, float], Tensor]


@dataclass
class FitState:
    """How far a training is. Written beside Accelerate's state, so a resumed run goes on where this one stopped.

    loss_sum, loss_count: of the batches of an epoch that is not over. floors: of the quantizers' scales.
    """

    update: int = 0
    best: float | None = None
    best_epoch: int = -1
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    floors: dict[str, float | None] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def fit(
    model: nn.Module,
    loss_function: LossFunction,
    loaders: Mapping[str, Any],
    options: OptimizerArguments,
    accelerator: Accelerator,
    checkpoint_dir: Path,
    *,
    name: str = "train",
    resume: bool = False,
    model_ema: bool = False,
    model_ema_decay: float = 0.998,
    eval_metric: str = "top1",
    reference: nn.Module | None = None,
    save_steps: int | None = None,
    save_total_limit: int = 2,
    interrupt: Interrupt | None = None,
    note: Callable[[], dict[str, float]] | None = None,
) -> FitState:
    """Train `model` in place; afterwards it holds the state (weights or their moving average) that was best on validation.

    Args:
        loss_function: `(model, images, labels, progress)` -> 0-d loss.
        loaders: "train" and "validation", prepared by `accelerator`; batches have pixel_values and labels. A stream, over
            an `IterableDataset`, needs `options.max_steps`, is validated every `options.eval_steps` updates, and has
            whole updates only with an accelerator whose `sync_with_dataloader` is off.
        checkpoint_dir: of this training alone; its state is kept here while it lasts. With `resume` it goes on from there.
        eval_metric: what "best" means on validation: top1 or top5 (higher), or loss or kl (lower).
        reference: the network that "kl" is measured from.
        save_steps: updates between two checkpoints within an epoch; there is one after each epoch in any case.
        save_total_limit: checkpoints that are kept. The one before the last takes its place where it is damaged.
        note: more numbers for the progress bar, e.g. average bits.

    Raises `DivergedError` for a loss that is not finite, `WriteError` where a checkpoint cannot be written, and
    `DamagedError` where none can be read.
    """
    interrupt = interrupt or Interrupt()
    train: DataLoaderShard = loaders["train"]
    accumulated = accelerator.gradient_accumulation_steps
    streamed = isinstance(train.dataset, IterableDataset)
    if streamed and not options.max_steps:
        raise ValueError(
            "The data are streamed, and nobody knows how long an epoch is: give max_steps instead of epochs."
        )
    # What is called an epoch of a stream are the updates from one validation to the next.
    per_epoch = options.eval_steps if streamed else math.ceil(len(train) / accumulated)
    if options.max_steps:
        options = replace(options, epochs=options.max_steps / per_epoch)
    updates = max(1, round(per_epoch * options.epochs))
    optimizer = create_optimizer(model, options)
    scheduler = create_scheduler(optimizer, options, per_epoch)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    ema = ModelEmaV3(model, decay=model_ema_decay, use_warmup=True) if model_ema else None
    state = FitState()
    best = checkpoint_dir / "best.safetensors"
    checkpoints = Checkpoints(checkpoint_dir, accelerator, save_total_limit)
    # Accelerate saves every model and optimizer that it ever prepared; only these two belong to this training.
    accelerator._models[:], accelerator._optimizers[:] = [wrapped], [prepared]
    accelerator._custom_objects[:] = [] if ema is None else [ema]

    trained = nn.ModuleList([model] if ema is None else [model, ema.module])

    def write(folder: Path) -> None:
        accelerator.save_state(str(folder), safe_serialization=True)
        if best.exists() and accelerator.is_main_process:
            shutil.copyfile(best, folder / best.name)

    def read(folder: Path) -> None:
        accelerator.load_state(str(folder))
        if (folder / best.name).exists() and accelerator.is_main_process:
            write_beside(best, lambda beside: shutil.copyfile(folder / best.name, beside))

    def save() -> None:
        check()
        state.seconds, state.floors = time.perf_counter() - started, floors(trained)
        checkpoints.save(state.update, asdict(state), write)

    def check(validation_loss: float = 0.0) -> None:
        loss_sum = progress.collect()
        finite = torch.tensor(float(math.isfinite(loss_sum + validation_loss)), device=accelerator.device)
        if accelerator.reduce(finite, reduction="mean").item() < 1:
            kind = "validation loss" if math.isfinite(loss_sum) and not math.isfinite(validation_loss) else "loss"
            raise DivergedError(
                f"{name}: the {kind} is no finite number any more at update {state.update} of {updates}, with a learning "
                f"rate of {max(group['lr'] for group in optimizer.param_groups):g} (peak {options.lr:g}): take a lower one, "
                "or look for values in the images or the weights that are not finite"
            )

    if not resume:
        checkpoints.remove()
    elif (kept := checkpoints.load(read)) is not None:
        state = FitState(**kept)
        set_floors(trained, state.floors)
        accelerator.print(f"{name}: goes on from update {state.update} of {updates}.")
    epoch, started = state.update // per_epoch, time.perf_counter() - state.seconds
    stream = endless(train, start=state.update * accumulated) if streamed else None
    progress = Progress(
        accelerator,
        name,
        options.epochs,
        per_epoch * accumulated if streamed else len(train),
        train.batch_size * accelerator.num_processes if streamed else train.total_batch_size,
    )
    while state.update < updates:
        done = state.update - epoch * per_epoch
        if stream is None:
            batches = _pass(train, epoch, done * accumulated)
        else:
            batches = islice(stream, (per_epoch - done) * accumulated)
        progress.start(epoch, done, state.loss_sum, state.loss_count)
        wrapped.train()
        for batch in batches:
            if state.update >= options.freeze_bn * updates:
                _freeze_batch_norm(model)
            with accelerator.accumulate(wrapped):
                scheduler.step_update(state.update)
                with accelerator.autocast():
                    loss = loss_function(wrapped, batch["pixel_values"], batch["labels"], state.update / updates)
                accelerator.backward(loss)
                if accelerator.sync_gradients and options.clip_grad > 0:
                    accelerator.clip_grad_norm_(wrapped.parameters(), options.clip_grad)
                prepared.step()
                prepared.zero_grad()
            progress.batch(loss, len(batch["labels"]), note() if note else {})
            if not accelerator.sync_gradients:
                continue
            state.update += 1
            if ema is not None:
                ema.update(accelerator.unwrap_model(wrapped), step=state.update)
            if state.update == updates:
                break
            if state.update % 10 == 0:
                check()
            # After an epoch's last update its validation comes first, so that a resumed run does not miss it.
            if state.update % per_epoch:
                stop = interrupt.requested(accelerator)
                if stop or (save_steps and state.update % save_steps == 0):
                    state.loss_sum, state.loss_count = progress.collect(), progress.loss_count
                    save()
                if stop:
                    interrupt.stop()
        check()
        evaluated = ema.module if ema is not None else wrapped
        metrics = evaluate(evaluated, loaders["validation"], accelerator, reference=reference)
        check(metrics["loss"])
        epoch += 1
        score = -metrics[eval_metric] if eval_metric in ("loss", "kl") else metrics[eval_metric]
        if state.best is None or score > state.best:
            state.best, state.best_epoch = score, epoch
            if accelerator.is_main_process:
                save_tensors((ema.module if ema is not None else model).state_dict(), best)
            accelerator.wait_for_everyone()
        # First, because it takes the mean of the epoch's losses.
        progress.finish(metrics)
        row = {"epoch": epoch, "train_loss": progress.mean_loss, **{f"validation_{k}": v for k, v in metrics.items()}}
        state.history.append(row)
        accelerator.log({f"{name}/{key}": value for key, value in row.items()}, step=state.update)
        state.loss_sum, state.loss_count = 0.0, 0
        state.seconds = time.perf_counter() - started
        stop = interrupt.requested(accelerator)
        if stop or state.update < updates:
            save()
        if stop:
            interrupt.stop()
    accelerator.wait_for_everyone()
    # Takes off the wrapper that makes every forward pass one in mixed precision: what is published computes in float32.
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    model.load_state_dict(load_tensors(best))
    return state


def _freeze_batch_norm(model: nn.Module) -> None:
    """Until the next `train()` norms compute with their running statistics, as after the training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _pass(train: Any, epoch: int, done: int) -> Any:
    """The batches of an epoch behind the first `done`."""
    if hasattr(train, "set_epoch"):
        train.set_epoch(epoch)
    batches = skip_first_batches(train, done) if done else train
    if hasattr(batches, "set_epoch"):
        # The loader that skips is a new one, which older versions of Accelerate let start at epoch 0.
        batches.set_epoch(epoch)
    return batches


@torch.no_grad()
def recalibrate(
    model: Any,
    loaders: Mapping[str, Any],
    accelerator: Accelerator,
    num_batches: int,
    reference: nn.Module | None = None,
    sources: Sequence[str] = ("calibration", "train"),
) -> None:
    """Leave the batch-norm statistics that are best on validation: the model's own, or those of `num_batches` batches.

    These are gathered from training images, clean as in calibration (METHOD 6.3) and augmented as in training, and
    averaged over ranks; `sources` are their loaders. Best is the lowest KL divergence from `reference`, or without it the
    lowest loss.
    """
    norms: list[Any] = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    if not norms or num_batches < 1:
        return

    def score() -> float:
        metrics = evaluate(model, loaders["validation"], accelerator, reference=reference)
        return metrics["loss"] if reference is None else metrics["kl"]

    def statistics() -> list[tuple[Tensor, Tensor]]:
        return [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]

    # Running statistics are of the last few batches; at one or two bits a model's divergence hangs on them.
    lowest, best = score(), statistics()
    for name in sources:
        # Always the same batches: a resumed run ends as the uninterrupted one.
        model.recalibrate_batch_norm(_pass(loaders[name], 0, 0), num_batches)
        for norm in norms:
            norm.running_mean.copy_(accelerator.reduce(norm.running_mean, reduction="mean"))
            norm.running_var.copy_(accelerator.reduce(norm.running_var, reduction="mean"))
        if (divergence := score()) < lowest:
            lowest, best = divergence, statistics()
    for norm, (mean, variance) in zip(norms, best, strict=True):
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
