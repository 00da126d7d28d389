"""Options of `scripts/run_sdq.py`, from the command line or a YAML file."""

import argparse
import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, get_origin

import yaml
from torch import nn
from transformers import HfArgumentParser

from ..costs import get_cost
from ..search import METHODS, SDQ_METHODS, check_granularity, check_options
from ..strategy import FLOAT_BITS
from .optim import OptimizerArguments, check_names, create_optimizer
from .ranges import BELOW_ONE, BETWEEN, FRACTION, NOT_NEGATIVE, POSITIVE, SEED, Range, check_numbers

RIVALS = [name for name in METHODS if name not in SDQ_METHODS]


def _option(default: Any, help: str, range: Range | None = None) -> Any:
    metadata = {"help": help, "range": range}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """The network and its quantizers."""

    model: str = _option("resnet20_cifar", "timm model name.")
    pretrained: bool = _option(False, "Start from timm's pretrained weights.")
    checkpoint: str | None = _option(None, "File with float weights of the model, as timm reads it.")
    pretrained_path: str | None = _option(
        None, "File with weights to start from in place of timm's pretrained ones; the head is new."
    )
    candidates: list[int] = _option([1, 2, 3, 4, 5, 6, 7, 8], "Bitwidths that a layer may have.")
    granularity: Literal["layer", "block", "net", "kernel"] = _option(
        "layer", "What shares one bitwidth; kernel: each output channel has its own."
    )
    activation_bits: int = _option(4, f"Bits of activations between the first and the last layer; {FLOAT_BITS}: float.")
    first_last_bits: int = _option(8, f"Bits of the first and last layer, which are not searched; {FLOAT_BITS}: float.")
    pins: list[str] = _option([], "PATTERN=BITS of layers the search leaves alone, e.g. 'layer1.*=8'.")
    weight_quantizer: Literal["lsq", "dorefa", "entropy"] = _option("lsq", "Form of the weight quantizer.")
    weight_grid: Literal["midrise", "twos_complement"] = _option("midrise", "Levels of the weights.")
    weight_scale: Literal["layer", "channel"] = _option(
        "layer", "What has a scale of its own; channel: each output channel, for 4 bytes of the file."
    )
    scales: Literal["float", "power_of_two"] = _option(
        "float", "power_of_two: train in the hardware profile, without batch norm and with scales that are shifts."
    )
    reparameterize: bool = _option(
        False, "Merge the training branches of RepVGG, MobileOne and their like before anything is quantized."
    )


@dataclass
class DataArguments:
    """Images. Default: the sample of Fashion-MNIST that comes with the repository."""

    dataset: str | None = _option(None, "Hub id, or a local path of parquet, arrow, image folders or idx files.")
    data_dir: str | None = _option(None, "Folder inside the data set, as in datasets.load_dataset.")
    dataset_config: str | None = _option(None, "Configuration of the data set, as in datasets.load_dataset.")
    image_column: str | None = _option(None, "Column of images; found by itself when not given.")
    label_column: str | None = _option(None, "Column of labels; found by itself when not given.")
    train_split: str | None = _option(None, "Name of the training split.")
    validation_split: str | None = _option(None, "Name of the validation split; held out of train when there is none.")
    test_split: str | None = _option(None, "Name of the test split, read once at the end.")
    validation_fraction: float = _option(0.1, "Part of train held out for validation, stratified.", BETWEEN)
    streaming: bool = _option(
        False,
        "Read images while they are used, without downloading all first; needs --max_steps or --epochs 0, and three splits.",
    )
    shuffle_buffer_size: int = _option(1000, "Images of a stream that wait in memory to be shuffled.", POSITIVE)
    max_train_samples: int | None = _option(None, "Use so many training images only.", POSITIVE)
    max_eval_samples: int | None = _option(None, "Use so many validation and test images only.", POSITIVE)
    on_bad_image: Literal["error", "skip"] = _option(
        "error",
        "What to do with images that cannot be decoded; skip decodes all images once before the run, to find them.",
    )
    on_missing_class: Literal["error", "keep"] = _option(
        "error", "What to do when a class has no training image; keep leaves it in the head, untrained."
    )
    img_size: int | None = _option(None, "Side of the images in pixels; default: the model's own.", POSITIVE)
    mean: list[float] = _option(
        [],
        "Mean of the images, 0 to 1, of each channel or of all, that own weights were trained with; default: timm's.",
        FRACTION,
    )
    std: list[float] = _option([], "Their standard deviation, likewise.", POSITIVE)
    aug: Literal["none", "light", "rand"] = _option(
        "light", "Augmentation: none, light (crop and flip), rand (RandAugment and erasing)."
    )
    mixup: float = _option(0.0, "timm's mixup alpha.", NOT_NEGATIVE)
    cutmix: float = _option(0.0, "timm's cutmix alpha.", NOT_NEGATIVE)
    label_smoothing: float = _option(0.0, "Label smoothing of the teacher's training.", BELOW_ONE)
    batch_size: int = _option(128, "Images per batch and process.", POSITIVE)
    workers: int = _option(0, "Processes that load images.", NOT_NEGATIVE)
    prefetch_factor: int | None = _option(None, "Batches that each worker loads ahead; default: 2.", POSITIVE)
    pin_memory: bool | None = _option(None, "Load into pinned memory; default: where there is a GPU.")


@dataclass
class TeacherArguments:
    """Training of the full-precision network, skipped with --pretrained or --checkpoint unless epochs are given."""

    teacher_epochs: int | None = _option(
        None, "Passes over the training images; default 30, or 0 with given weights.", NOT_NEGATIVE
    )
    teacher_max_steps: int | None = _option(
        None, "Updates, in place of epochs; needed where data are streamed.", POSITIVE
    )
    teacher_opt: str = _option("sgd", "timm optimizer.")
    teacher_lr: float = _option(0.1, "Learning rate at the peak.", POSITIVE)
    teacher_weight_decay: float = _option(5e-4, "Of conv and linear weights only.", NOT_NEGATIVE)
    teacher_batch_size: int | None = _option(None, "Images per batch and process; default: --batch_size.", POSITIVE)


@dataclass
class SearchArguments:
    """Phase 1: budgets and how strategies for them are found."""

    target_bits: list[float] = _option(
        [], "Budgets in average weight bits of the searched layers, e.g. 2.0 3.6.", POSITIVE
    )
    target_bitops: list[float] = _option(
        [], "Budgets in BitOPs, given as the uniform bits that cost as much, e.g. 2.", POSITIVE
    )
    budgets: list[str] = _option(
        [],
        "COST=VALUE: budgets in bits, bytes, compression, bitops, lut, or the cost of a JSON table, e.g. compression=12 "
        "latency.json=3.5; the value uniform3 is what uniform 3 bits cost.",
    )
    search: str = _option(
        "two_sided", f"How strategies are found: SDQ as two_sided (ours) or paper, or a rival: {', '.join(RIVALS)}."
    )
    search_options: list[str] = _option([], "NAME=VALUE of the search method, e.g. caution=0.5; see its docstring.")
    controls: list[str] = _option(["uniform", "greedy"], "Rivals to compare with, or none.")
    search_activations: bool = _option(
        False,
        "Also find the bits of inputs, for budgets in which they count, such as BitOPs; rivals keep --activation_bits.",
    )
    start_bits: int | None = _option(
        None,
        "Bits at which all layers start; default 6 or above every budget, or without a fine-tune the largest candidate.",
    )
    floors: list[str] = _option([], "PATTERN=BITS: fewest bits of the layers that match.")
    search_batch_size: int | None = _option(
        None, "Images per batch and process of the search; default: --batch_size.", POSITIVE
    )
    search_weight_lr: float = _option(
        3e-4,
        "Learning rate of weights that follow the search; 0: they stay frozen, as without a fine-tune.",
        NOT_NEGATIVE,
    )
    max_search_batches: int = _option(20_000, "Give up a search after so many batches.", POSITIVE)


@dataclass
class FinetuneArguments(OptimizerArguments):
    """Phase 2: training at fixed bits, with distillation and bin regularization. --epochs 0: calibration in its place."""

    kd: bool = _option(True, "Distillation: learn from the teacher's outputs alone; false: from the labels alone.")
    kd_teacher: str | None = _option(None, "timm model that teaches; default: the full-precision network itself.")
    kd_teacher_checkpoint: str | None = _option(None, "Its weights; default: timm's pretrained ones.")
    ebr_weight: float = _option(
        0.0, "Weight of entropy-aware bin regularization; the paper's is 0.1, meant for dorefa.", NOT_NEGATIVE
    )
    model_ema: bool = _option(False, "Keep the exponential moving average of the weights (timm's ModelEmaV3).")
    model_ema_decay: float = _option(0.998, "Its decay.", BELOW_ONE)
    eval_metric: Literal["kl", "loss", "top1", "top5"] | None = _option(
        None, "Which epoch is kept, by validation; default: kl to the teacher, as the training, or loss without one."
    )
    bn_batches: int = _option(
        200,
        "Batches, clean and augmented, from which batch norm statistics are gathered anew at the end; validation chooses "
        "between these and the running ones. 0: none, and without a fine-tune the search has the running ones too.",
        NOT_NEGATIVE,
    )

    @property
    def trains(self) -> bool:
        """Whether there is a fine-tune; with `--epochs 0` the network is calibrated only."""
        return self.epochs > 0


@dataclass
class RunArguments:
    """The run itself."""

    output_dir: str = _option("runs/sdq", "Folder for everything the run writes.")
    stage: Literal["all", "teacher", "search", "finetune", "evaluate"] = _option(
        "all", "What to do; a single stage builds on what earlier ones left in output_dir."
    )
    resume: bool = _option(False, "Go on where the run in output_dir stopped.")
    overwrite: bool = _option(
        False, "Remove the run in output_dir and start anew; with --resume, or a later stage, it goes on all the same."
    )
    save_steps: int = _option(
        200,
        "Batches of a search, and updates of a training, between checkpoints; a training has one after each epoch too.",
        POSITIVE,
    )
    save_total_limit: int = _option(
        2,
        "Checkpoints that are kept of what is running; where the last is damaged, the one before it takes its place.",
        POSITIVE,
    )
    seed: int = _option(0, "Of weights, data order, augmentation and draws.", SEED)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _option(None, "Default: as Accelerate was launched.")
    gradient_accumulation_steps: int = _option(1, "Batches per update.", POSITIVE)
    grad_checkpointing: bool = _option(
        False, "Compute activations again in the backward pass, where timm can: less memory, more time."
    )
    torch_compile: bool = _option(False, "Train compiled by torch.compile; the search's drawn weights stay eager.")
    torch_compile_backend: str = _option("inductor", "Its backend.")
    cpu: bool = _option(False, "Stay on the CPU where there is a GPU.")
    report_to: list[str] = _option([], "Trackers of Accelerate: tensorboard, trackio, wandb.")
    push_to_hub: bool = _option(False, "Publish the models of the SDQ budgets at the end, each on a branch of its own.")
    hub_model_id: str | None = _option(None, "Repository to publish in, such as org/resnet18-sdq; made when missing.")
    hub_private_repo: bool | None = _option(
        None, "Whether a repository that is made is private; default: the account's."
    )
    hub_license: str | None = _option(
        None, "Licence of the weights, for the card, as the Hub names it, e.g. apache-2.0."
    )


@dataclass
class Arguments:
    model: ModelArguments
    data: DataArguments
    teacher: TeacherArguments
    search: SearchArguments
    finetune: FinetuneArguments
    run: RunArguments

    def to_dict(self) -> dict[str, Any]:
        """All options by name, as they would stand in a YAML file."""
        return {key: value for group in vars(self).values() for key, value in asdict(group).items()}

    def with_values(self, values: Mapping[str, Any]) -> "Arguments":
        """These options with `values` of some of them, by name, in place of their own."""
        groups = vars(self).values()
        return Arguments(
            *(replace(g, **{f.name: values[f.name] for f in fields(g) if f.name in values}) for g in groups)
        )

    def command(self, processes: int = 1) -> str:
        """The command that gives the same result: the options that differ from their defaults, for a model card."""
        parts = ["accelerate launch", *([f"--num_processes {processes}"] * (processes > 1)), "scripts/run_sdq.py"]
        for group in vars(self).values():
            defaults = type(group)()
            for key, value in asdict(group).items():
                if value == getattr(defaults, key) or key in _NOT_IN_COMMAND:
                    continue
                # Where a folder lies on one machine is of no use on another.
                values = [Path(value).name] if key in _PATHS and Path(value).is_absolute() else value
                values = values if isinstance(values, list) else [values]
                values = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]
                parts.append(f"--{key} {' '.join(shlex.quote(str(v)) for v in values)}")
        return " ".join(parts)


# Options that do not change the result.
_NOT_IN_COMMAND = {
    *("output_dir", "stage", "resume", "overwrite", "report_to", "cpu", "workers", "prefetch_factor", "pin_memory"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_license", "save_steps", "save_total_limit"),
}
_PATHS = {"dataset", "data_dir", "checkpoint", "pretrained_path", "kd_teacher_checkpoint"}


class ArgumentError(ValueError):
    """A wrong option: one line."""


class _Parser(HfArgumentParser):
    def add_argument(self, *names: Any, range: Range | None = None, **options: Any) -> Any:
        # The metadata of a field arrive here; `range` is for `check_numbers`.
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(message)

    def unknown(self, option: str) -> ArgumentError:
        near = get_close_matches(option, list(self._option_string_actions), n=1)
        return ArgumentError(f"unknown option {option}" + (f" (did you mean {near[0]}?)" if near else ""))


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Options from `argv`: an optional YAML file first, then options that override it.

    Raises `ArgumentError` with one line for an option that is unknown or wrong. `--help` prints and exits.
    """
    groups: list[Any] = [
        ModelArguments,
        DataArguments,
        TeacherArguments,
        SearchArguments,
        FinetuneArguments,
        RunArguments,
    ]
    parsed = parse_groups(
        groups,
        argv,
        "run_sdq.py",
        "Learn the bitwidth of each layer (SDQ), fine-tune at those bits, and write a packed model.",
    )
    arguments = Arguments(*parsed)
    _check(arguments)
    return arguments


def parse_groups(
    groups: Sequence[Any], argv: Sequence[str], prog: str, description: str, **defaults: Any
) -> tuple[Any, ...]:
    """One object of each dataclass in `groups` from the options `argv`, as `parse_arguments` reads them.

    Numbers are within the ranges of their fields. defaults: in place of those of the dataclasses.
    """
    parser = _Parser(
        groups,
        allow_abbrev=False,
        prog=prog,
        usage=f"{prog} [FILE.yaml] [--option value ...]",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(**defaults)
    argv = list(argv)
    if argv and argv[0].endswith((".yaml", ".yml")):
        known = {f.name: get_origin(f.type) is list for group in groups for f in fields(group)}
        given, empty = _yaml_options(Path(argv[0]), known)
        parser.set_defaults(**{name: [] for name in empty})
        argv = given + argv[1:]
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except ArgumentError:
        raise
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    if rest:
        raise parser.unknown(rest[0])
    for group in parsed:
        try:
            check_numbers(group)
        except ValueError as error:
            raise ArgumentError(str(error)) from None
        if isinstance(group, OptimizerArguments):
            _check_recipe(group)
    return tuple(parsed)


def _check_recipe(recipe: OptimizerArguments) -> None:
    try:
        check_names(recipe)
    except ValueError as error:
        raise ArgumentError(f"--opt or --sched: {error}") from None
    try:
        # Nesterov momentum, for one, may not be 0.
        create_optimizer(nn.Linear(1, 1), recipe)
    except ValueError as error:
        raise ArgumentError(f"--opt {recipe.opt}: {error}") from None
    if recipe.min_lr > recipe.lr:
        raise ArgumentError(f"--min_lr must be at most --lr, {recipe.lr:g}, got {recipe.min_lr:g}")


def _yaml_options(path: Path, known: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    """The file's entries as command-line options, so that both are checked by the same rules, and names of empty lists.

    known: option -> whether it takes a list.
    """
    try:
        entries = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ArgumentError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ArgumentError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, dict):
        raise ArgumentError(f"{path} must hold `option: value` lines.")
    argv: list[str] = []
    empty: list[str] = []
    for key, value in entries.items():
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            raise ArgumentError(f"{path}: unknown option {key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        if value == []:
            # Not possible on a command line.
            if not known[key]:
                raise ArgumentError(f"{path}: {key} takes one value, got []")
            empty.append(key)
        elif value is not None:
            argv += [f"--{key}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return argv, empty


def _check(arguments: Arguments) -> None:
    search, run, tune, data = arguments.search, arguments.run, arguments.finetune, arguments.data
    if not search.target_bits and not search.target_bitops and not search.budgets:
        search.target_bits = [2.0]
    search.controls = search.controls or ["none"]
    for source, *_ in budget_entries(search):
        try:
            get_cost(source)
        except ValueError as error:
            raise ArgumentError(f"--budgets: {error}") from None
    _check_methods(search, arguments.model.granularity)
    teacher = arguments.teacher
    needs_steps = tune.max_steps is None and tune.trains
    if data.streaming and (needs_steps or teacher.teacher_epochs):
        option = "max_steps" if needs_steps else "teacher_max_steps"
        raise ArgumentError(
            f"--streaming: nobody knows how long an epoch of a stream is: give --{option} instead of "
            f"--{option.replace('max_steps', 'epochs')}"
        )
    if (data.mixup > 0 or data.cutmix > 0) and (data.batch_size % 2 or (teacher.teacher_batch_size or 0) % 2):
        raise ArgumentError(f"--mixup and --cutmix need an even --batch_size, got {data.batch_size}")
    for option, file in (
        ("checkpoint", arguments.model.checkpoint),
        ("pretrained_path", arguments.model.pretrained_path),
        ("kd_teacher_checkpoint", tune.kd_teacher_checkpoint),
    ):
        if file is not None and not Path(file).is_file():
            raise ArgumentError(f"--{option} {file} is no file")
    if arguments.model.checkpoint and arguments.model.pretrained_path:
        raise ArgumentError("--checkpoint has all weights and --pretrained_path all but the head: give one of them")
    try:
        check_names(OptimizerArguments(opt=teacher.teacher_opt))
    except ValueError as error:
        raise ArgumentError(f"--teacher_opt: {error}") from None
    bits_by_pattern(arguments.model.pins, "pins")
    bits_by_pattern(search.floors, "floors")
    if run.push_to_hub and not run.hub_model_id:
        raise ArgumentError("--push_to_hub needs --hub_model_id, such as org/resnet18-sdq")


def _check_methods(search: SearchArguments, granularity: str) -> None:
    for option, names, known in (
        ("search", [search.search], list(METHODS)),
        ("controls", search.controls, [*RIVALS, "none"]),
    ):
        for name in names:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ArgumentError(f"--{option} takes {', '.join(known)}, got {name!r}{hint}")
    try:
        check_granularity(search.search, granularity, search.search_activations)
        for name in search.controls:
            check_granularity(name, granularity if name != "none" else "layer")
    except ValueError as error:
        raise ArgumentError(f"--granularity or --search_activations: {error}") from None
    try:
        check_options(search.search, values_by_name(search.search_options))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"--search_options: {error}") from None


def values_by_name(entries: Sequence[str]) -> dict[str, Any]:
    """`["caution=0.5"]` -> `{"caution": 0.5}`, values as YAML reads them; `ArgumentError` for anything else."""
    result: dict[str, Any] = {}
    for entry in entries:
        name, sign, value = entry.partition("=")
        if not name or not sign or not value:
            raise ArgumentError(f"--search_options takes NAME=VALUE, e.g. caution=0.5, got {entry!r}")
        result[name] = yaml.safe_load(value)
        # YAML 1.1 reads 1e-3 as text.
        if isinstance(result[name], str):
            with suppress(ValueError):
                result[name] = float(value)
        if isinstance(result[name], float) and not math.isfinite(result[name]):
            raise ArgumentError(f"--search_options: {name} must be a finite number, got {value}")
    return result


def budget_entries(search: SearchArguments) -> list[tuple[str, str, bool, float]]:
    """(cost or file of its table, label, whether the value is one of uniform bits, value) of each budget asked for."""
    entries = [("bits", f"{value:g}", False, value) for value in search.target_bits]
    entries += [("bitops", f"{value:g}", True, value) for value in search.target_bitops]
    for text in search.budgets:
        source, sign, value = text.rpartition("=")
        uniform = value.startswith("uniform")
        try:
            number = float(value.removeprefix("uniform"))
        except ValueError:
            number = math.nan
        if not source or not sign or not math.isfinite(number):
            raise ArgumentError(f"--budgets takes COST=VALUE, e.g. compression=12 or lut=uniform3, got {text!r}")
        entries.append((source, f"{'uniform' * uniform}{number:g}", uniform, number))
    return entries


def bits_by_pattern(entries: Sequence[str], option: str) -> dict[str, int]:
    """`["stem.*=8"]` -> `{"stem.*": 8}`; `ArgumentError` for anything else."""
    result = {}
    for entry in entries:
        pattern, _, bits = entry.rpartition("=")
        if not pattern or not bits.isdigit():
            raise ArgumentError(f"--{option} takes PATTERN=BITS, e.g. 'layer1.*=8', got {entry!r}")
        result[pattern] = int(bits)
    return result
