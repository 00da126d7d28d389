"""SDQ's search (phase 1): one descent in which every layer's weights are drawn at one of two adjacent bitwidths."""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..checkpoint import digest
from ..quantizers.positive import floors, set_floors
from ..strategy import Strategy
from ..training.losses import DivergedError
from ..training.optim import OptimizerArguments, create_optimizer
from .agreement import check_agreement
from .descent import BudgetError
from .errors import quantization_errors
from .stochastic_inputs import StochasticInputs
from .stochastic_weights import StochasticWeights, searching
from .task import SearchState, Task, distillation_loss
from .updates import Paper, TwoSided


def two_sided(task: Task, **options: Any) -> list[Strategy]:
    """Our extension of SDQ; options as in `TwoSided`."""
    return _descend(task, TwoSided(task.descent, task.seed, **options))


def paper(task: Task, **options: Any) -> list[Strategy]:
    """The paper's update; options as in `Paper`."""
    errors = quantization_errors(task.model, task.descent)
    return _descend(task, Paper(task.descent, task.seed, errors, **options))


def _descend(task: Task, update: TwoSided | Paper) -> list[Strategy]:
    model, descent, log, accelerator, resume_from = (
        task.model,
        task.descent,
        task.log,
        task.accelerator,
        task.resume_from,
    )
    step, trained = 0, task.weight_lr > 0
    tensors: Mapping[str, Tensor] = {}
    if resume_from is not None:
        step, tensors = resume_from["batch"], resume_from.get("tensors", {})
        _check_trained(tensors, trained)
        # The activation steps at the start, which the model is left with.
        model.load_state_dict(_under("fitted.", tensors), strict=False)
        descent.load_state_dict(resume_from["descent"])
        update.load_state_dict(resume_from["update"])
        log.moves, log.estimates = list(resume_from["moves"]), list(resume_from["estimates"])
        log.batches, log.backward_images = step, resume_from["backward_images"]
    else:
        task.calibrate()
    fitted = {key: tensor.clone() for key, tensor in model.state_dict().items() if ".input_quantizer." in key}
    teacher = task.float_network()
    weights, inputs = StochasticWeights(model, descent, trained=trained), StochasticInputs(model, descent)
    try:
        with searching(model, trained, task.copied(teacher), task.batch_norm) as parameters:
            training = Training(task, parameters)
            if resume_from is not None:
                training.load(tensors)
                set_floors(model, resume_from["floors"])
            weights.start(_under("scales.", tensors))
            inputs.start(_under("inputs.", tensors) or task.input_steps())
            if isinstance(update, Paper):
                update.errors |= inputs.errors()

            def state_dict() -> dict[str, Any]:
                state = {
                    "batch": step,
                    "descent": descent.state_dict(),
                    "update": update.state_dict(),
                    "moves": log.moves,
                    "estimates": log.estimates,
                    "backward_images": log.backward_images,
                    "floors": floors(model),
                }
                found = {f"fitted.{name}": value for name, value in fitted.items()}
                found |= {f"inputs.{name}": value for name, value in inputs.steps.items()}
                if trained:
                    found |= {f"scales.{name}": value for name, value in weights.scales().items()}
                    found |= training.tensors()
                state["tensors"] = found
                return state

            # Batches that share one draw and one update, as in the training loop.
            accumulated = accelerator.gradient_accumulation_steps
            batches = task.batches(start=step * accumulated)
            distributed = accelerator.num_processes > 1
            begin = {"budgets": descent.budgets, "weights": digest(model.state_dict())} if distributed else {}
            while True:
                drawn = update.draw(step)
                if distributed:
                    places = {"bits": dict(descent.bits), "draws": drawn, "estimates": update.state_dict()}
                    check_agreement(accelerator, step, begin | places)
                if descent.done:
                    break
                if step >= task.max_batches:
                    raise BudgetError(
                        f"The search reached {descent.text(descent.total())} in {task.max_batches} batches, and its budget "
                        f"of {descent.text(min(descent.budgets))} was not met. Raise max_batches, or cost_weight or lr of "
                        "the paper's method."
                    )
                weights.choose(drawn)
                inputs.choose(drawn)
                mean_loss, count = torch.zeros((), device=model.device), 0
                for _ in range(accumulated):
                    images = next(batches)["pixel_values"].to(model.device)
                    loss = distillation_loss(model, teacher, images, accelerator) / accumulated
                    (loss * training.scale).backward()
                    mean_loss, count = mean_loss + loss.detach(), count + len(images)
                gradients = torch.cat([weights.gradients(), inputs.gradients()]) / training.scale
                gradients = cast(Tensor, accelerator.reduce(gradients, reduction="mean"))
                values = dict(zip(descent.names, gradients.tolist(), strict=True))
                if training.step(mean_loss, math.isfinite(sum(values.values()))):
                    update.observe(values, drawn)
                moved = None
                # One step at a time, or a few where there are very many that could be taken.
                for move in update.next_moves(max(1, len(descent.names) // 25)):
                    if descent.done:
                        break
                    moved = move.layer
                    task.move(step, moved, move.damage, move.error)
                    (inputs if descent.units[moved].inputs else weights).step_down(moved)
                    update.reset(moved)
                if step % log.every == 0:
                    log.estimates.append(
                        {
                            "batch": step,
                            "cost": descent.total(),
                            "layers": {n: [descent.bits[n], *v] for n, v in update.estimates().items()},
                        }
                    )
                step += 1
                log.batches, log.backward_images = step, log.backward_images + count
                if task.on_step is not None:
                    average = descent.average_bits()
                    task.on_step(
                        SearchState(step, descent.total(), average, mean_loss.item(), count, moved, state_dict)
                    )
    finally:
        weights.clear()
        inputs.clear()
    return descent.strategies()


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `tensors` whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _check_trained(tensors: Mapping[str, Tensor], trained: bool) -> None:
    """`ValueError` where a search whose tensors these are trained weights and the one that goes on does not, or reversed."""
    before = bool(_under("scales.", tensors))
    if before != trained:
        what = "its weights" if before else "no weights (weight_lr was 0)"
        raise ValueError(f"The saved search trained {what}: resume it with the weight_lr that it had.")


class Training:
    """Weights that follow the search, by AdamW on its loss; nothing where there are no `parameters` to train.

    The loss is multiplied by `scale` before its backward pass: gradients of half precision underflow otherwise.
    """

    def __init__(self, task: Task, parameters: list[nn.Parameter]):
        self.model, self.parameters, self.accelerator = task.model, parameters, task.accelerator
        self.scale = 1024.0 if task.accelerator.mixed_precision == "fp16" else 1.0
        options = OptimizerArguments(lr=task.weight_lr, weight_decay=0.0)
        self.optimizer = create_optimizer(task.model, options) if parameters else None
        self.lost = 0

    def step(self, loss: Tensor, finite: bool) -> bool:
        """Update the weights; False, and nothing is changed, where a gradient is not finite.

        `finite`: whether the method's own gradients are, which have been averaged over all ranks.
        Half precision can overflow, and such a batch tells nothing. Otherwise, or when it goes on for 20 batches, the weights
        are lost: raises `DivergedError`.
        """
        if self.optimizer is None:
            return self._check(loss, finite)
        used = [parameter for parameter in self.parameters if parameter.grad is not None]
        gradients = [cast(Tensor, parameter.grad) for parameter in used]
        if self.accelerator.num_processes > 1:
            # All in one message.
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            flat = cast(Tensor, self.accelerator.reduce(flat, reduction="mean"))
            for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view(gradient.shape))
        if self.scale != 1:
            for gradient in gradients:
                gradient.div_(self.scale)
        if not self._check(loss, finite and bool(torch.stack([g.isfinite().all() for g in gradients]).all())):
            self.optimizer.zero_grad()
            return False
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def _check(self, loss: Tensor, finite: bool) -> bool:
        self.lost = 0 if finite else self.lost + 1
        if self.lost > (20 if self.scale != 1 else 0):
            rates = [group["lr"] for group in self.optimizer.param_groups] if self.optimizer else [0.0]
            raise DivergedError(
                f"The search's gradients are not finite any more, at a loss of {loss.item():g} and a learning rate of "
                f"{max(rates):g} of the weights: take a lower one (weight_lr), or look for values in the images or the "
                "weights that are not finite."
            )
        return finite

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the model's and the optimizer's tensors."""
        assert self.optimizer is not None
        found = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
        return {key: value.detach().clone().contiguous() for key, value in found.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if self.optimizer is None:
            return
        self.model.load_state_dict(_under("model.", tensors))
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _under("optimizer.", tensors).items():
            index, _, field_name = key.partition(".")
            state.setdefault(int(index), {})[field_name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
