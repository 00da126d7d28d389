"""Study A: SDQ and its rivals at the same budgets, epochs and distillation, over several float networks.

    python scripts/study_search.py --dataset ../shared/data/fashion-mnist --model mobilenetv1_025_cifar \
        --out docs/results/search-mobilenetv1_025_cifar.json

A cell is one search method at one budget with one seed, which is that of the float network, the validation split, the search
and the fine-tune. Cells are kept in the result file, in the order of their worth; a study that is stopped goes on where it
was. `--shard 0/2` and `--shard 1/2` share the cells between two processes.

What a search that trains (SDQ, fracbits, edmips) has looked at is taken off its fine-tune: a quarter of an epoch of search
leaves 3.75 epochs of 4. The measured rivals get all epochs, whatever their passes cost. The epoch that is kept is chosen on
the validation split, held out of train; the test split is read once for each cell, and nothing is chosen by it.

With `--epochs 0` nothing is trained: searches look at the network as it is, and it is calibrated at the bits they find.

"two_sided_activations" is SDQ that finds the bits of inputs too, where the others leave them at --activation_bits, and
"two_sided_frozen" SDQ whose weights stay what they are while it searches.

The methods "float" and "float_kd" are no searches: the float network itself, trained for as many epochs more as the others
are fine-tuned, from labels or from its former self.
"""

import argparse
import copy
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from accelerate.utils import set_seed
from study_common import TRAINED, Cell, above_sdq, add_options, as_found, mean_and_error, read, tuned, work
from torch import Tensor, nn

from sdq_hf.costs import get_cost
from sdq_hf.search import METHODS, BudgetError
from sdq_hf.strategy import FLOAT_BITS
from sdq_hf.training.arguments import SearchArguments
from sdq_hf.training.evaluation import evaluate
from sdq_hf.training.fit import fit
from sdq_hf.training.stages import Run

FIELDS = ("seed", "method", "cost", "target", "activation_bits")
# Float networks that are trained on as long as the others, without and with distillation from where they were.
FLOAT = ("float", "float_kd")
# SDQ that finds the bits of inputs too.
ACTIVATIONS = "two_sided_activations"
# SDQ that does not train the weights while it searches.
FROZEN = "two_sided_frozen"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=[*METHODS, ACTIVATIONS, FROZEN, *FLOAT])
    parser.add_argument("--target_bits", type=float, nargs="*", default=[2.0])
    parser.add_argument("--target_bitops", type=float, nargs="*", default=[2.0, 3.0])
    parser.add_argument("--target_lut", type=float, nargs="*", default=[], help="LUT costs of so many uniform bits")
    options = parser.parse_args()
    if not options.epochs and {FROZEN, *FLOAT} & set(options.methods):
        parser.error(f"--methods {FROZEN} {' '.join(FLOAT)}: with --epochs 0 nothing is trained in any row")
    if not options.table:
        work(options, cells(options), FIELDS, lambda run, cell: measure(options, run, cell))
    print(table(read(options.out)["cells"]))


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Seeds come last, so that a study that is cut off has the same seeds for all methods but the last."""
    budgets = [(cost, t) for cost in ("bits", "bitops", "lut") for t in getattr(options, f"target_{cost}")]
    for seed in options.seeds:
        for method in FLOAT:
            if method in options.methods:
                yield dict(zip(FIELDS, (seed, method, "float", float(FLOAT_BITS), FLOAT_BITS), strict=True))
        for cost, target in budgets:
            for method in [method for method in options.methods if method not in FLOAT]:
                if method == "uniform" and (target % 1 or (cost != "bits" and ("bits", target) in budgets)):
                    # Whole numbers only, and the same strategy in all costs.
                    continue
                if method == ACTIVATIONS and cost == "bits":
                    # Average bits are those of weights: inputs cost nothing there.
                    continue
                yield dict(zip(FIELDS, (seed, method, cost, target, options.activation_bits), strict=True))


def measure(options: argparse.Namespace, run: Run, cell: Mapping[str, Any]) -> Cell:
    """Search, fine-tune, and read the test split."""
    method, cost, target = cell["method"], cell["cost"], cell["target"]
    if method in FLOAT:
        return trained_on(options, run, method)
    budget = target if cost == "bits" else get_cost(cost).of_uniform(run.base.strategy, target)
    name = f"{method}-{cost}-{target:g}"
    search = "two_sided" if method in (ACTIVATIONS, FROZEN) else method
    run.arguments.search.search_activations = method == ACTIVATIONS
    run.arguments.search.search_weight_lr = 0.0 if method == FROZEN else SearchArguments.search_weight_lr
    try:
        (strategy,), seconds, log = run.search_one(name, [budget], cost, search)
    except BudgetError as error:
        return {"error": str(error)}
    # What a search that trains has looked at is taken off its fine-tune, where there is one.
    searched = log.backward_images / len(run.data.splits["train"]) if search in TRAINED else 0.0
    epochs = round(options.epochs - searched, 2) if options.epochs else 0.0
    if options.epochs and epochs <= 0:
        return {"error": f"the search took {searched:.1f} epochs, and {options.epochs} were to be had"}
    about = {"method": method, "cost": cost, "budget": budget, "seconds": seconds}
    return {
        **tuned(run, name, strategy, about, epochs),
        "found": as_found(run, strategy),
        "input_bits": [strategy[layer].activation_bits for layer in run.base.strategy.searchable],
        "search_batches": log.batches,
        "search_forward_images": log.forward_images,
        "search_backward_images": log.backward_images,
        "search_seconds": round(seconds, 1),
    }


def trained_on(options: argparse.Namespace, run: Run, method: str) -> Cell:
    """The float network, trained on for as many epochs as a fine-tune has, with the same optimizer and choice of epoch."""
    network, distil = copy.deepcopy(run.network).requires_grad_(), method == "float_kd"

    def labels_loss(student: nn.Module, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        return F.cross_entropy(student(images), labels)

    set_seed(run.arguments.run.seed)
    loaders, arguments = run.loaders(), replace(run.arguments.finetune, epochs=options.epochs)
    fit(
        network,
        run.distillation_loss(run.network) if distil else labels_loss,
        loaders,
        arguments,
        run.accelerator,
        run.folder / method,
        name=method,
        eval_metric="kl" if distil else "loss",
        reference=run.network,
    )
    validation, test = (
        evaluate(network, loaders[split], run.accelerator, reference=run.network) for split in ("validation", "test")
    )
    return {**test, "validation": validation, "average_bits": float(FLOAT_BITS), "finetune_epochs": options.epochs}


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: test KL and top-1 of each method at each budget, mean over seeds and standard error of the mean.

    Also the validation KL of the strategy as it was found, before the fine-tune, and by how much the KL after it is above
    that of "two_sided" with the same seed, on test and on validation: float network, split and order of images are the same.
    """
    lines = [
        "| budget | search | test KL, nats | above SDQ's, same seeds | on validation | test top-1, % "
        "| validation KL before training | average bits | seeds |",
        "|" + "---|" * 9,
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in found:
        if "error" not in cell:
            groups.setdefault((cell["activation_bits"], cell["cost"], cell["target"], cell["method"]), []).append(cell)
    ranked = sorted(groups.items(), key=lambda g: (*g[0][:3], statistics.fmean(c["kl"] for c in g[1])))
    for key, members in ranked:
        activation_bits, cost, target, method = key
        sdq = groups.get((*key[:3], "two_sided"), [])
        unit = {"bits": "average bits", "bitops": "bits' BitOPs", "lut": "bits' LUT cost"}.get(cost)
        budget = f"{target:g} {unit}, A{activation_bits}" if unit else "float"
        numbers = [
            mean_and_error([cell["kl"] for cell in members], 4),
            above_sdq(method, _by_seed(members), _by_seed(sdq), p_value=True),
            above_sdq(method, _by_seed(members, "validation"), _by_seed(sdq, "validation")),
            mean_and_error([cell["top1"] for cell in members], 2),
        ]
        before = [cell["found"]["kl"] for cell in members if "found" in cell]
        numbers.append(mean_and_error(before, 3) if len(before) == len(members) else "")
        bits = statistics.fmean(cell["average_bits"] for cell in members)
        lines.append(f"| {budget} | {method} | {' | '.join(numbers)} | {bits:.2f} | {len(members)} |")
    return "\n".join(lines)


def _by_seed(cells: list[dict[str, Any]], split: str | None = None) -> dict[int, float]:
    """Seed -> KL, on test or on another split."""
    return {cell["seed"]: (cell if split is None else cell[split])["kl"] for cell in cells}


if __name__ == "__main__":
    main()
