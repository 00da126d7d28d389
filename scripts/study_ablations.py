"""Study B: what each part of SDQ is worth, by leaving it out or changing it.

    python scripts/study_ablations.py --dataset ../shared/data/fashion-mnist \
        --out docs/results/ablations-mobilenetv1_025_cifar.json

All rows are fine-tunes at the average bits of one search (`--target_bits`), as in the paper's ablations:

- strategy: the learned one; uniform bits; and the learned bits handed out in reverse, so that the layer with the most bits
  gets the fewest, at the same average;
- bin regularization (EBR) of several weights, with the learned quantizer and with the paper's (`dorefa`);
- teachers of three sizes, the network itself and two larger ones, and hard labels instead of a teacher.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from study_common import Cell, add_options, mean_and_error, read, train_float, tuned, work

from sdq_hf.strategy import Strategy
from sdq_hf.training.stages import Run

FIELDS = ("seed", "part", "value", "activation_bits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--target_bits", type=float, default=2.0)
    parser.add_argument("--parts", nargs="+", default=["strategy", "teacher", "ebr", "ebr_dorefa"])
    parser.add_argument("--ebr", nargs="+", default=["0", "0.01", "0.1", "1"], help="weights of the regularizer")
    parser.add_argument("--teachers", nargs="+", default=["mobilenetv1_035_cifar", "mobilenetv1_050_cifar"])
    options = parser.parse_args()
    if not options.table:
        work(options, cells(options), FIELDS, lambda run, cell: measure(options, run, cell))
    print(table(read(options.out)["cells"]))


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    # Without it the learned quantizer has its row in `strategy`.
    values: dict[str, Sequence[str]] = {
        "strategy": ("learned", "uniform", "reversed"),
        "teacher": ("labels", *options.teachers),
        "ebr": [value for value in options.ebr if float(value)],
        "ebr_dorefa": options.ebr,
    }
    for seed in options.seeds:
        for part in options.parts:
            for value in values[part]:
                yield dict(zip(FIELDS, (seed, part, value, options.activation_bits), strict=True))


def measure(options: argparse.Namespace, run: Run, cell: Mapping[str, Any]) -> Cell:
    part, value = cell["part"], cell["value"]
    (learned,), seconds, _ = run.search_one("two_sided", [options.target_bits], "bits", "two_sided")
    strategy, quantizer = learned, run.arguments.model.weight_quantizer
    changes: dict[str, Any] = {}
    if part == "strategy" and value == "uniform":
        strategy = learned.with_bits(round(options.target_bits))
    elif part == "strategy" and value == "reversed":
        strategy = reversed_bits(learned, run.base.config.candidates)
    elif part == "teacher" and value == "labels":
        changes = {"kd": False}
    elif part == "teacher":
        larger = argparse.Namespace(**{**vars(options), "model": value})
        teacher = train_float(larger, cell["seed"], options.teacher_epochs)
        changes = {"kd_teacher": value, "kd_teacher_checkpoint": str(teacher)}
    elif part.startswith("ebr"):
        changes = {"ebr_weight": float(value)}
    about = {"method": "two_sided", "cost": "bits", "budget": options.target_bits, "seconds": seconds}
    if part == "ebr_dorefa":
        run.arguments.model.weight_quantizer = "dorefa"
    try:
        return tuned(run, f"{part}-{value}", strategy, about, options.epochs, **changes)
    finally:
        run.arguments.model.weight_quantizer = quantizer


def reversed_bits(learned: Strategy, candidates: Sequence[int]) -> Strategy:
    """The learned bits handed out in reverse: the layer with the most gets the fewest.

    Large layers get many bits so. All are moved by the same number until the average is met, and what is left over goes to
    the layers with the most reversed bits.
    """
    ranked = sorted(learned.searchable, key=lambda name: learned[name].average_bits)
    turned = {name: round(learned[other].average_bits) for name, other in zip(ranked, reversed(ranked), strict=True)}
    target, low, high = learned.average_bits(), min(candidates), max(candidates)

    def moved(by: int) -> dict[str, int]:
        return {name: min(max(bits + by, low), high) for name, bits in turned.items()}

    bits = next(
        b for b in (moved(by) for by in range(high, -high - 1, -1)) if learned.with_bits(b).average_bits() <= target
    )
    order = sorted(bits, key=lambda name: -turned[name])
    while True:
        options = ({**bits, name: bits[name] + 1} for name in order if bits[name] < high)
        fitting = [more for more in options if learned.with_bits(more).average_bits() <= target]
        if not fitting:
            return learned.with_bits(bits)
        bits = fitting[0]
        # Whoever got one waits for the others.
        order.sort(key=lambda name: bits[name] - turned[name])


def table(cells: list[Cell]) -> str:
    """Markdown: test KL and top-1 of each change, mean over float networks and standard error.

    Beside them are the differences from the learned strategy with the same seeds, since rows may have other seeds.
    """
    lines = [
        "| change | test KL, nats | above the learned | test top-1, % | above the learned | average bits | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], dict[int, Cell]] = {}
    for cell in cells:
        groups.setdefault((cell["part"], cell["value"]), {})[cell["seed"]] = cell
    learned = groups.get(("strategy", "learned"), {})
    labels = {
        "strategy": "{} strategy",
        "teacher": "teacher: {}",
        "ebr": "EBR {}, learned quantizer",
        "ebr_dorefa": "EBR {}, dorefa",
    }
    for (part, value), members in groups.items():
        columns = []
        for key, digits in (("kl", 4), ("top1", 2)):
            differences = [cell[key] - learned[seed][key] for seed, cell in members.items() if seed in learned]
            columns.append(mean_and_error([cell[key] for cell in members.values()], digits))
            columns.append(mean_and_error(differences, digits) if value != "learned" and differences else "")
        columns.append(f"{sum(cell['average_bits'] for cell in members.values()) / len(members):.2f}")
        lines.append(f"| {labels[part].format(value)} | {' | '.join(columns)} | {len(members)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
