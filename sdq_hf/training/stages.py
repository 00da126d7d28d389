"""The stages of a run: teacher, search, finetune, evaluate. Each leaves its result in the run's folder.

teacher/model.safetensors        float weights
search/strategies.json           one entry per strategy; search/<name>.json: the log of each search
models/<name>/                   packed model, with config.json
finetune/<name>.json             validation metrics and time
results.json, plots/*.png        the end
"""

import gc
import math
import os
import time
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, broadcast, set_seed
from torch import Tensor, nn

from ..backbones import create_backbone, hub_id, normalisation, set_grad_checkpointing, sized
from ..costs import Cost, get_cost
from ..layers import input_quantizers
from ..modeling_sdq import SDQForImageClassification
from ..search import SDQ_METHODS, SearchLog, SearchState, search
from ..search.descent import Descent
from ..search.units import input_units, layer_units
from ..strategy import Strategy, bits_text
from ..writing import remove, save_tensors, write_json, writing
from .arguments import (
    ArgumentError,
    Arguments,
    DataArguments,
    FinetuneArguments,
    bits_by_pattern,
    budget_entries,
    values_by_name,
)
from .checkpoints import Checkpoints, load_json, load_tensors
from .data import ImageData, load_image_data
from .evaluation import evaluate, logits_of
from .fit import FitState, LossFunction, fit, recalibrate
from .interrupt import Interrupt, Interrupted
from .loaders import build_loaders, build_mixup
from .losses import DivergedError, distillation, ramp, total_bin_regularization
from .optim import OptimizerArguments
from .progress import SearchProgress

STAGES = ("teacher", "search", "finetune", "evaluate")
_LEFT_BY = {
    "teacher": ["teacher"],
    "search": ["search"],
    "finetune": ["finetune", "models"],
    "evaluate": ["results.json", "plots"],
}
# What shows that a stage has been run.
_RESULT_OF = {"teacher": "teacher/model.safetensors", "search": "search/strategies.json", "finetune": "models"}
# All that a run leaves which is stopped before it began.
_FIRST = {"arguments.json.new"}
# Options that may differ when a run is resumed.
_FREE = {
    *("stage", "resume", "overwrite", "output_dir", "report_to", "workers", "prefetch_factor", "pin_memory", "cpu"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_license", "save_steps", "save_total_limit"),
}
# Options of the fine-tune that a search depends on.
_SEARCHED_FOR = {"epochs", "bn_batches"}


class Run:
    """One run in `arguments.run.output_dir`. Call the stages in their order."""

    def __init__(self, arguments: Arguments, interrupt: Interrupt):
        self.arguments, self.interrupt = arguments, interrupt
        self.folder = Path(arguments.run.output_dir)
        self._check_folder()
        self.accelerator = _accelerator(arguments)
        self.data = load_data(arguments.data, arguments.run.seed)
        self.network = self._create_float_network()
        self.base = self.quantize(self.network)
        self._loaders: dict[int, dict[str, Any]] = {}
        self._check_plan()
        # Nothing is written, and nothing of an earlier run removed, before all that can be wrong has been looked at.
        self._prepare_folder()

    def _check_plan(self) -> None:
        """Refuse budgets, floors and teachers that later stages would refuse, before any training."""
        search, tune = self.arguments.search, self.arguments.finetune
        teacher = tune.kd_teacher if tune.trains else None
        floors = bits_by_pattern(search.floors, "floors")
        for cost, targets in self._budgets():
            budgets = list(targets.values())
            strategy = self.base.strategy
            units = layer_units(strategy) | (input_units(strategy) if search.search_activations else {})
            Descent(strategy, cost, budgets, self.base.config.candidates, self._start_bits(), floors, units)
        if teacher is not None:
            network = create_backbone(
                teacher, pretrained=False, num_classes=len(self.data.label_names), **self._model_args(teacher)
            )
            if tune.kd_teacher_checkpoint is None and not self._fits_data(network):
                raise ArgumentError(
                    f"--kd_teacher {teacher}: its pretrained weights are for other classes than those of the data, so it "
                    "has nothing to teach: train it on them and give --kd_teacher_checkpoint"
                )
        if self.arguments.data.streaming and self._teacher_epochs() and not self.arguments.teacher.teacher_max_steps:
            raise ArgumentError(
                "--streaming: the teacher must be trained, and nobody knows how long an epoch of a stream is: give "
                "--teacher_max_steps, or trained weights with --checkpoint"
            )
        self._check_mixing()
        train = self.loaders()["train"]
        if not self.arguments.data.streaming and not len(train):
            raise ArgumentError(
                f"The training split has fewer batches of {self.arguments.data.batch_size} than processes"
            )

    def _check_mixing(self) -> None:
        """Refuse mixup of an odd number of images, which a split smaller than one batch may leave."""
        data = self.arguments.data
        if data.streaming or self.accelerator.num_processes > 1 or data.mixup <= 0 >= data.cutmix:
            # Streams have whole batches only, and several processes fill theirs up.
            return
        images = len(self.data.splits["train"])
        if images % 2 and images < max(data.batch_size, self.arguments.teacher.teacher_batch_size or 0):
            raise ArgumentError(
                f"--mixup and --cutmix need an even number of images in a batch, and the only one has the {images} of the "
                "training split"
            )

    def _fits_data(self, network: nn.Module) -> bool:
        """Whether timm's pretrained weights of `network` have a head for the classes of the data."""
        config: Any = getattr(network, "pretrained_cfg", None) or {}
        return config.get("num_classes") == len(self.data.label_names)

    def _budgets(self) -> list[tuple[Cost, dict[str, float]]]:
        """Costs that the options name budgets in, each with label -> budget."""
        sources: dict[str, tuple[Cost, dict[str, float]]] = {}
        for source, label, uniform, value in budget_entries(self.arguments.search):
            cost, budgets = sources.setdefault(source, (get_cost(source), {}))
            budgets[label] = cost.of_uniform(self.base.strategy, value) if uniform else value
        names = [cost.name for cost, _ in sources.values()]
        if len(set(names)) < len(names):
            raise ArgumentError(f"--budgets: two tables with the same name: {', '.join(names)}")
        return list(sources.values())

    def _start_bits(self) -> int | None:
        """Bits at which searches start; None: their own choice."""
        start, trains = self.arguments.search.start_bits, self.arguments.finetune.trains
        # 6 bits cost next to nothing after a fine-tune, and something without.
        return max(self.base.config.candidates) if start is None and not trains else start

    # Folder ------------------------------------------------------------------------------------------------------

    def _check_folder(self) -> None:
        run, path = self.arguments.run, self.folder / "arguments.json"
        options = self.arguments.to_dict()
        if run.resume or run.stage not in ("all", "teacher"):
            if not path.exists():
                nothing = f"--output_dir {self.folder} holds no run to go on with"
                if run.resume:
                    raise ArgumentError(f"{nothing}: start one without --resume")
                raise ArgumentError(f"--stage {run.stage}: {nothing}: run --stage teacher there first, or name another")
            anew = "start anew with --overwrite true in place of --resume" if run.resume else "choose another folder"
            before = load_json(path, anew)
            if run.resume:
                _check_same(before, options, anew)
            else:
                # A single stage builds on the data split and the network of those before it.
                shared = {**vars(self.arguments.model), **vars(self.arguments.data), "seed": run.seed}
                _check_same(before, shared, anew)
                for stage in STAGES[: STAGES.index(run.stage)]:
                    if not (self.folder / _RESULT_OF[stage]).exists():
                        raise self._missing(stage)
                if run.stage == "finetune" and self.arguments.finetune.trains != (before["epochs"] > 0):
                    given, kind = self.arguments.finetune.epochs, "with" if before["epochs"] else "without"
                    raise ArgumentError(
                        f"--epochs {given:g}: the bits in {self.folder} were searched for a network {kind} a fine-tune: give "
                        f"the --epochs of the search, {before['epochs']:g}, or run --stage search with these"
                    )
        elif path.exists():
            # A run that found a fault in its options, say, has left nothing to lose.
            left = [name for names in _LEFT_BY.values() for name in names if (self.folder / name).exists()]
            if left and not run.overwrite:
                raise ArgumentError(
                    f"--output_dir {self.folder} holds a run: go on with it (--resume true), remove it and start anew "
                    "(--overwrite true), or choose another folder (--output_dir)"
                )
        elif self.folder.exists() and {p.name for p in self.folder.iterdir()} - _FIRST:
            raise ArgumentError(
                f"--output_dir {self.folder} is not empty and holds no earlier run: choose another folder"
            )

    def _prepare_folder(self) -> None:
        run = self.arguments.run
        if self.accelerator.is_main_process:
            # Safetensors writes beside, too, and its file outlives a killed process.
            for path in self.folder.rglob(".tmp*"):
                remove(path)
            if not run.resume:
                first = 0 if run.stage == "all" else STAGES.index(run.stage)
                # What is built on first, and each stage's result before the rest: whenever this is cut short, what is left
                # is a part of the earlier run that can go on.
                for stage in reversed(STAGES[first:]):
                    for name in [*([_RESULT_OF[stage]] if stage in _RESULT_OF else []), *_LEFT_BY[stage]]:
                        remove(self.folder / name)
            options = self.arguments.to_dict()
            if not run.resume and run.stage not in ("all", "teacher"):
                # What earlier stages were run with stays on record.
                before = load_json(self.folder / "arguments.json")
                options = {**options, **{k: v for k, v in before.items() if k not in self._own_options()}}
            write_json(self.folder / "arguments.json", options)
        self.accelerator.wait_for_everyone()
        if run.report_to:
            self.accelerator.init_trackers("sdq", config={k: str(v) for k, v in self.arguments.to_dict().items()})

    def _own_options(self) -> set[str]:
        """Options that belong to the one stage that is run."""
        arguments = self.arguments
        own = {"search": arguments.search, "finetune": arguments.finetune}.get(arguments.run.stage)
        return {*_FREE, *(vars(own) if own is not None else ()), *(_SEARCHED_FOR if own is arguments.search else ())}

    def recorded(self) -> Arguments:
        """The options that each stage was run with, whichever this one is."""
        return self.arguments.with_values(load_json(self.folder / "arguments.json"))

    def _missing(self, stage: str) -> ArgumentError:
        return ArgumentError(f"--output_dir {self.folder} has no result of the stage {stage!r}: run that stage first")

    # Network and data --------------------------------------------------------------------------------------------

    def _create_float_network(self) -> nn.Module:
        model = self.arguments.model
        set_seed(self.arguments.run.seed)
        network = create_backbone(
            model.model,
            pretrained=model.pretrained,
            checkpoint_path=model.checkpoint or "",
            pretrained_path=model.pretrained_path,
            num_classes=len(self.data.label_names),
            **self._model_args(model.model),
        )
        self._describe_images(network)
        if self.arguments.run.grad_checkpointing:
            set_grad_checkpointing(network)
        return network.to(self.accelerator.device).to(memory_format=torch.channels_last)

    def _describe_images(self, network: Any) -> None:
        """Where the options say so, the network is for images of another mean or standard deviation than timm says."""
        data = self.arguments.data
        given = {field: getattr(data, field) for field in ("mean", "std") if getattr(data, field)}
        for field, values in given.items():
            if len(values) not in (1, self.data.channels):
                raise ArgumentError(
                    f"--{field} takes one number, or one for each of the {self.data.channels} channels, got {len(values)}"
                )
        network.pretrained_cfg = {**network.pretrained_cfg, **given}

    def _model_args(self, architecture: str) -> dict[str, Any]:
        return sized(architecture, {"in_chans": self.data.channels}, self.arguments.data.img_size)

    def quantize(self, network: nn.Module) -> SDQForImageClassification:
        """The quantized model of a float network, as the options of the model say."""
        model = self.arguments.model
        quantized = SDQForImageClassification.from_float(
            network,
            model.model,
            id2label=dict(enumerate(self.data.label_names)),
            model_args=self._model_args(model.model),
            img_size=self.arguments.data.img_size,
            candidates=model.candidates,
            granularity=model.granularity,
            activation_bits=model.activation_bits,
            first_last_bits=model.first_last_bits,
            pins=bits_by_pattern(model.pins, "pins"),
            weight_quantizer=model.weight_quantizer,
            weight_grid=model.weight_grid,
            weight_scale=model.weight_scale,
            scales=model.scales,
            reparameterize=model.reparameterize,
            base_model=hub_id(network) if model.pretrained and not model.pretrained_path else None,
        )
        if self.arguments.run.grad_checkpointing:
            set_grad_checkpointing(quantized.timm_model)
        return quantized.to(self.accelerator.device).to(memory_format=torch.channels_last)

    def loaders(self, batch_size: int | None = None) -> dict[str, Any]:
        """Loaders by split, prepared by Accelerate: train, validation, test, calibration."""
        data = self.arguments.data
        size = batch_size or data.batch_size
        if size not in self._loaders:
            loaders = build_loaders(
                self.data,
                self.base.config.pretrained_cfg or {},
                batch_size=size,
                img_size=data.img_size,
                aug=data.aug,
                num_workers=data.workers,
                prefetch_factor=data.prefetch_factor,
                pin_memory=data.pin_memory,
                seed=self.arguments.run.seed,
            )
            self._loaders[size] = {name: self.accelerator.prepare(loader) for name, loader in loaders.items()}
        return self._loaders[size]

    # Stages ------------------------------------------------------------------------------------------------------

    def teacher(self) -> None:
        """Train the full-precision network, unless its weights were given."""
        path = self.folder / "teacher" / "model.safetensors"
        checkpoint_dir = path.parent / "training"
        if path.exists() and path.with_name("teacher.json").exists() and self._wants("teacher"):
            self._remove(checkpoint_dir)
            return self._load_teacher()
        if not self._wants("teacher"):
            if not path.exists():
                raise self._missing("teacher")
            return self._load_teacher()
        options, data, epochs = self.arguments.teacher, self.arguments.data, self._teacher_epochs()
        started, loaders = time.perf_counter(), self.loaders(options.teacher_batch_size)
        if epochs or options.teacher_max_steps:
            loss = _loss_of_labels(data, len(self.data.label_names))
            recipe = OptimizerArguments(
                epochs=epochs,
                max_steps=options.teacher_max_steps,
                eval_steps=self.arguments.finetune.eval_steps,
                opt=options.teacher_opt,
                lr=options.teacher_lr,
                weight_decay=options.teacher_weight_decay,
            )
            set_seed(self.arguments.run.seed)
            fit(
                self.network,
                loss,
                loaders,
                recipe,
                self.accelerator,
                checkpoint_dir,
                name="teacher",
                **self._checkpointing(),
            )
        metrics = evaluate(self.network, loaders["validation"], self.accelerator)
        if not math.isfinite(metrics["loss"]):
            raise DivergedError(
                f"The full-precision network's validation loss is {metrics['loss']}: its weights or the images hold values "
                "that are not finite"
            )
        if self.accelerator.is_main_process:
            write_json(path.parent / "teacher.json", {"seconds": time.perf_counter() - started, "validation": metrics})
            save_tensors(self.network.state_dict(), path)
        self._remove(checkpoint_dir)
        self._load_teacher()

    def _teacher_epochs(self) -> int:
        model, epochs = self.arguments.model, self.arguments.teacher.teacher_epochs
        if epochs is not None:
            return epochs
        # timm gives a pretrained network a new, random head where the classes differ: that one must be trained.
        has_head = model.pretrained and not model.pretrained_path and self._fits_data(self.network)
        given = model.checkpoint or has_head
        return 0 if given else 30

    def _checkpointing(self) -> dict[str, Any]:
        """Options of `fit` about checkpoints and stops."""
        run = self.arguments.run
        return {
            "resume": run.resume,
            "save_steps": run.save_steps,
            "save_total_limit": run.save_total_limit,
            "interrupt": self.interrupt,
        }

    def _remove(self, folder: Path) -> None:
        """Remove a folder that is of no use any more, when all ranks are done with it."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            remove(folder)
        self.accelerator.wait_for_everyone()

    def _load_teacher(self) -> None:
        state = load_tensors(self.folder / "teacher" / "model.safetensors")
        self.network.load_state_dict(state)
        self.network.eval()
        self.base.load_float_state(state)
        self.base.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._calibrate(self.base)

    def search(self) -> list[dict[str, Any]]:
        """Find the strategies of all budgets, with SDQ and with the controls."""
        path = self.folder / "search" / "strategies.json"
        if path.exists():
            return load_json(path)
        if not self._wants("search"):
            raise self._missing("search")
        options = self.arguments.search
        entries: list[dict[str, Any]] = []
        start = self.base.strategy
        uniform_bits = set()
        for cost, targets in self._budgets():
            # Whole-number uniform bits are made below, once for all costs.
            controls = [name for name in options.controls if name not in ("uniform", "none")]
            main = "sdq" if options.search in SDQ_METHODS else options.search
            methods = {main: options.search} | {name: name for name in controls}
            for label, method in methods.items():
                found, seconds, log = self.search_one(f"{label}-{cost.name}", list(targets.values()), cost, method)
                for (target, budget), strategy in zip(targets.items(), found, strict=True):
                    entries.append(
                        {
                            "name": f"{label}-{cost.name}-{target}",
                            "method": label,
                            "cost": cost.name,
                            "budget": budget,
                            "seconds": seconds,
                            "batches": log.batches,
                            "strategy": strategy.to_json(),
                        }
                    )
            uniform_bits |= {_uniform_above(cost, budget, start) for budget in targets.values()}
        if "uniform" in options.controls:
            for bits in sorted(uniform_bits):
                strategy = start.with_bits(bits)
                entries.append(
                    {
                        "name": f"uniform-{bits}",
                        "method": "uniform",
                        "cost": "bits",
                        "budget": bits,
                        "seconds": 0.0,
                        "batches": 0,
                        "strategy": strategy.to_json(),
                    }
                )
        if self.accelerator.is_main_process:
            write_json(path, entries)
        self.accelerator.wait_for_everyone()
        return entries

    def search_one(
        self, name: str, budgets: list[float], cost: str | Cost, method: str
    ) -> tuple[list[Strategy], float, SearchLog]:
        """One search: a strategy for each budget, seconds, and the log. A finished one is read when the run is resumed."""
        options, run = self.arguments.search, self.arguments.run
        folder = self.folder / "search"
        log, result = SearchLog(), folder / f"{name}.json"
        checkpoints = Checkpoints(folder / name, self.accelerator, run.save_total_limit)
        self.interrupt.check(self.accelerator)
        if run.resume and result.exists():
            checkpoints.remove()
            kept = load_json(result)
            for field in ("moves", "batches", "forward_images", "backward_images"):
                setattr(log, field, kept[field])
            return [Strategy.from_json(strategy) for strategy in kept["strategies"]], kept["seconds"], log
        state = _load_search(checkpoints) if run.resume else None
        started = time.perf_counter() - (state["seconds"] if state else 0.0)
        cost = get_cost(cost)
        least = min(cost.limit(budget) for budget in budgets)
        progress = SearchProgress(self.accelerator, name, least, state["batch"] if state else 0)

        def on_step(step: SearchState) -> None:
            progress.batch(step.batch, step.images, step.loss, step.cost, step.average_bits)
            stop = self.interrupt.requested(self.accelerator)
            # A rival that is stopped begins anew.
            if method in SDQ_METHODS and (stop or step.batch % run.save_steps == 0):
                _save_search(checkpoints, step, time.perf_counter() - started)
            if stop:
                self.interrupt.stop()

        # Without a fine-tune the bits are for the network as it will be: with its own weights, and, where these are gathered
        # anew, batch norm statistics of images at those bits.
        tune = self.arguments.finetune
        set_seed(run.seed)
        strategies = search(
            self.base,
            self.loaders(options.search_batch_size)["train"],
            budgets,
            cost,
            method,
            seed=run.seed,
            start_bits=self._start_bits(),
            floors=bits_by_pattern(options.floors, "floors"),
            search_activations=options.search_activations and method == options.search,
            weight_lr=options.search_weight_lr if tune.trains else 0.0,
            batch_norm="batch" if tune.trains or tune.bn_batches else "running",
            max_batches=options.max_search_batches,
            log=log,
            accelerator=self.accelerator,
            on_step=on_step,
            resume_from=state,
            **(values_by_name(options.search_options) if method == options.search else {}),
        )
        progress.finish()
        seconds = time.perf_counter() - started
        for budget, strategy in zip(budgets, strategies, strict=True):
            self.accelerator.print(
                f"{name}: for {budget:.4g} {cost.unit}: {strategy.average_bits():.2f} average bits, "
                f"{strategy.bitops() / 1e9:.4f} GBitOPs, bits {' '.join(map(bits_text, strategy.weight_bits.values()))}",
                flush=True,
            )
        if self.accelerator.is_main_process:
            found = [strategy.to_json() for strategy in strategies]
            write_json(result, {"seconds": seconds, "budgets": budgets, "strategies": found, **log.to_json()})
        checkpoints.remove()
        return strategies, seconds, log

    def finetune(self, entries: list[dict[str, Any]]) -> None:
        """Train, or without a fine-tune calibrate, the network at the bits of each strategy; save it packed, load it back."""
        for entry in entries:
            name, record = entry["name"], self.folder / "finetune" / f"{entry['name']}.json"
            if record.exists() and (self.folder / "models" / name).exists():
                self._remove(record.with_suffix(""))
                continue
            if not self._wants("finetune"):
                raise self._missing("finetune")
            self.finetune_one(name, Strategy.from_json(entry["strategy"]))

    def finetune_one(
        self, name: str, strategy: Strategy, options: FinetuneArguments | None = None
    ) -> SDQForImageClassification:
        """Train the network at the bits of `strategy` and leave a packed model; `options`: default those of the run.

        With 0 epochs it is calibrated only, and its batch norm statistics are gathered anew where that helps.

        Returns the model with its real weights, which a packed file has no more.
        """
        from ..hub.plots import plot_weights

        record = self.folder / "finetune" / f"{name}.json"
        self.interrupt.check(self.accelerator)
        options = options or self.arguments.finetune
        loaders = self.loaders()
        set_seed(self.arguments.run.seed)
        model = self.quantize(self.network)
        model.set_strategy(strategy)
        self._calibrate(model)
        teacher = self._kd_teacher(options) if options.kd and options.trains else None
        # An epoch is judged by what the training aims at, and what is not trained by the float network.
        metric = "loss" if options.trains and teacher is None else "kl"
        if options.trains and options.eval_metric:
            metric = options.eval_metric
        reference = (teacher or self.network) if metric == "kl" else None
        checkpoint_dir = record.parent / name
        state = FitState()
        if options.trains:
            state = fit(
                model,
                self._finetune_loss(model, teacher, options.ebr_weight),
                loaders,
                options,
                self.accelerator,
                checkpoint_dir,
                name=name,
                model_ema=options.model_ema,
                model_ema_decay=options.model_ema_decay,
                eval_metric=metric,
                reference=reference,
                **self._checkpointing(),
                note=lambda: {"bits": strategy.average_bits()},
            )
        recalibrate(model, loaders, self.accelerator, options.bn_batches, reference)
        metrics = evaluate(model, loaders["validation"], self.accelerator, reference=self.network)
        # By all ranks: the batches of a stream are handed out by the main process, which would wait for the others.
        images = next(iter(loaders["validation"]))["pixel_values"]
        if self.accelerator.is_main_process:
            folder = self.folder / "models" / name
            beside = folder.with_name(f".{name}.new")
            remove(beside)
            with writing(beside):
                model.eval().save_pretrained(beside, print_size=False)
            plot_weights(model, beside / "plots" / "weights.png")
            _check_reloaded(model, beside, images)
            remove(folder)
            os.replace(beside, folder)
            print(f"{model.size_report(folder)} Loaded back: logits are bit-identical.", flush=True)
            write_json(
                record,
                {
                    "seconds": state.seconds,
                    "best_epoch": state.best_epoch,
                    "validation": metrics,
                    "history": state.history,
                },
            )
        self._remove(checkpoint_dir)
        return model

    def close(self) -> None:
        end(self.accelerator)

    def _calibrate(self, model: SDQForImageClassification) -> None:
        """Fit activation steps to the main process's images; all ranks take its result."""
        model.calibrate(self.loaders()["calibration"])
        share_steps(model)
        if self.arguments.run.torch_compile:
            # Quantizers read numbers from their state at the first use, which would break a compiled graph.
            with torch.no_grad():
                model.eval()(torch.zeros(1, *model.config.input_size, device=model.device))

    def _finetune_loss(
        self, model: SDQForImageClassification, teacher: nn.Module | None, ebr_weight: float
    ) -> LossFunction:
        """That of the teacher's outputs, or without one of the labels, and bin regularization on top."""
        labels_loss = _loss_of_labels(self.arguments.data, len(self.data.label_names))
        task_loss = labels_loss if teacher is None else self.distillation_loss(teacher)

        def loss(student: nn.Module, images: Tensor, labels: Tensor, progress: float) -> Tensor:
            total = task_loss(student, images, labels, progress)
            if ebr_weight > 0:
                total = total + ebr_weight * ramp(progress) * total_bin_regularization(model)
            return total

        return loss

    def distillation_loss(self, teacher: nn.Module) -> LossFunction:
        """The loss of a student that learns from its teacher's outputs alone; mixed images have no label that matters."""
        data = self.arguments.data
        return loss_of_teacher(teacher, build_mixup(data.mixup, data.cutmix, 0.0, len(self.data.label_names)))

    def _kd_teacher(self, options: FinetuneArguments) -> nn.Module:
        if options.kd_teacher is None:
            return self.network
        teacher = create_backbone(
            options.kd_teacher,
            pretrained=options.kd_teacher_checkpoint is None,
            checkpoint_path=options.kd_teacher_checkpoint or "",
            num_classes=len(self.data.label_names),
            **self._model_args(options.kd_teacher),
        )
        teacher = taking_images_of(self.network, teacher, self.data.channels)
        return teacher.to(self.accelerator.device).to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def _wants(self, stage: str) -> bool:
        return self.arguments.run.stage in ("all", stage)


def _save_search(checkpoints: Checkpoints, step: SearchState, seconds: float) -> None:
    is_main = checkpoints.accelerator.is_main_process
    # Taken by the main process alone: it is the same on all ranks.
    state = {**step.state_dict(), "seconds": seconds} if is_main else {}
    tensors = state.pop("tensors", None)

    def write(folder: Path) -> None:
        if tensors:
            save_tensors(tensors, folder / "search.safetensors")

    checkpoints.save(step.batch, state, write)


def _load_search(checkpoints: Checkpoints) -> dict[str, Any] | None:
    """What `search` resumes from, None where there is no checkpoint."""
    tensors: dict[str, Tensor] = {}

    def read(folder: Path) -> None:
        if (folder / "search.safetensors").exists():
            tensors.update(load_tensors(folder / "search.safetensors"))

    state = checkpoints.load(read)
    return {**state, "tensors": tensors} if state is not None and tensors else state


def _accelerator(arguments: Arguments) -> Accelerator:
    run = arguments.run
    for tracker in run.report_to:
        known = ["tensorboard", "trackio", "wandb"]
        if tracker not in known:
            near = get_close_matches(tracker, known, n=1) or known
            raise ArgumentError(f"--report_to {tracker!r} is no tracker; did you mean {near[0]!r}?")
    try:
        accelerator = Accelerator(
            mixed_precision=run.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=run.gradient_accumulation_steps,
                # The end of a stream's data is no end of anything.
                sync_with_dataloader=not arguments.data.streaming,
            ),
            # None: as Accelerate was launched.
            dynamo_backend=run.torch_compile_backend if run.torch_compile else None,
            cpu=run.cpu,
            log_with=run.report_to or None,
            project_dir=run.output_dir,
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    if len(accelerator.log_with) < len(run.report_to):
        names = " ".join(run.report_to)
        raise ArgumentError(f"--report_to {names}: not all of them are installed; pip install {names}")
    return accelerator


def load_data(data: DataArguments, seed: int) -> ImageData:
    """The images that the options ask for."""
    return load_image_data(
        data.dataset,
        data_dir=data.data_dir,
        config_name=data.dataset_config,
        image_column=data.image_column,
        label_column=data.label_column,
        train_split=data.train_split,
        validation_split=data.validation_split,
        test_split=data.test_split,
        validation_fraction=data.validation_fraction,
        seed=seed,
        max_train_samples=data.max_train_samples,
        max_eval_samples=data.max_eval_samples,
        streaming=data.streaming,
        shuffle_buffer_size=data.shuffle_buffer_size,
        on_bad_image=data.on_bad_image,
        on_missing_class=data.on_missing_class,
    )


def end(accelerator: Accelerator) -> None:
    """Trackers finish, and processes part.

    What was wrapped for several processes is freed first: when the wrapper outlives the connection, torch 2.11 can hang
    while it frees both.
    """
    accelerator._models.clear()
    accelerator._optimizers.clear()
    gc.collect()
    accelerator.end_training()


def share_steps(model: nn.Module) -> None:
    """All ranks take the activation steps that the main process has fitted to its images."""
    for quantizer in input_quantizers(model).values():
        quantizer.load_state_dict(broadcast(dict(quantizer.state_dict())))


def loss_of_teacher(teacher: nn.Module, mixup: Callable[..., Any] | None = None) -> LossFunction:
    """The loss of a student that learns from the outputs of `teacher` alone, of images that `mixup` mixes."""

    def loss(student: nn.Module, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        if mixup is not None:
            images, _ = mixup(images, labels)
        with torch.no_grad():
            target = logits_of(teacher(images))
        return distillation(logits_of(student(images)), target)

    return loss


def taking_images_of(network: nn.Module, teacher: nn.Module, channels: int) -> nn.Module:
    """`teacher`, as it takes images that are normalised for `network`."""
    (mean, std), (own_mean, own_std) = (torch.tensor(normalisation(n, channels)) for n in (network, teacher))
    if torch.equal(mean, own_mean) and torch.equal(std, own_std):
        return teacher
    return nn.Sequential(_Affine(std / own_std, (mean - own_mean) / own_std), teacher)


class _Affine(nn.Module):
    """`x * factor + offset` of images [B, C, H, W], with one of each channel."""

    factor: Tensor
    offset: Tensor

    def __init__(self, factor: Tensor, offset: Tensor):
        super().__init__()
        self.register_buffer("factor", factor.view(-1, 1, 1))
        self.register_buffer("offset", offset.view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.offset


def _loss_of_labels(data: DataArguments, classes: int) -> LossFunction:
    """Cross-entropy with the labels, smoothed or mixed as the options say."""
    mixup = build_mixup(data.mixup, data.cutmix, data.label_smoothing, classes)

    def loss(model: nn.Module, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        if mixup is None:
            return F.cross_entropy(logits_of(model(images)).float(), labels, label_smoothing=data.label_smoothing)
        images, targets = mixup(images, labels)
        return -(targets * F.log_softmax(logits_of(model(images)).float(), dim=-1)).sum(dim=-1).mean()

    return loss


def _uniform_above(cost: Cost, budget: float, strategy: Strategy) -> int:
    """The next whole number of bits, so that uniform bits never have less to spend than `budget`; of equal costs the most."""
    costs = {bits: cost.total(strategy.with_bits(bits)) for bits in range(1, 9)}
    enough = min((c for c in costs.values() if c >= cost.limit(budget) * (1 - 1e-9)), default=max(costs.values()))
    return max(bits for bits in costs if costs[bits] == enough)


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], anew: str) -> None:
    for name, value in now.items():
        if name not in _FREE and before.get(name, value) != value:
            raise ArgumentError(
                f"--{name} was {before[name]!r} when the run started and is {value!r} now: go on with the same options, "
                f"or {anew}"
            )


def _check_reloaded(model: SDQForImageClassification, folder: Path, images: Tensor) -> None:
    """The packed file gives the very logits that the trained network gives, or `RuntimeError`."""
    loaded = SDQForImageClassification.from_pretrained(folder).to(images.device).to(memory_format=torch.channels_last)
    with torch.no_grad():
        same = torch.equal(loaded(images).logits, model(images).logits)
    if not same:
        raise RuntimeError(f"{folder}: the loaded model's logits differ from those of the model that was saved.")


__all__ = ["STAGES", "Interrupted", "Run"]
