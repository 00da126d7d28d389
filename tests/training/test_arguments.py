"""Options and the ranges of their numbers, from the command line and from YAML."""

import inspect
import shlex
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from sdq_hf.training import arguments as module
from sdq_hf.training.arguments import ArgumentError, parse_arguments, parse_groups
from sdq_hf.training.optim import OptimizerArguments

GROUPS = [c for name, c in inspect.getmembers(module, inspect.isclass) if name.endswith("Arguments")]
GROUPS.remove(module.Arguments)
OPTIONS = {field.name: field for group in GROUPS for field in fields(group)}
# Bits, which the model's configuration and the search look at: they must be among the candidates.
BITS = {"candidates", "activation_bits", "first_last_bits", "start_bits"}


def names_of(kind: type) -> list[str]:
    return sorted(name for name, field in OPTIONS.items() if kind in (field.type, *get_args(field.type)))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", names_of(float))
def test_every_float_is_finite(name: str, value: str):
    with pytest.raises(ArgumentError) as error:
        parse_arguments([f"--{name}={value}"])
    assert str(error.value) == f"--{name} must be a finite number, got {value}"


@pytest.mark.parametrize("name", sorted({*names_of(int), *names_of(float)} - BITS))
def test_no_number_is_negative_on_the_command_line_or_in_yaml(name: str, tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(f"{name}: -1")
    for argv in ([f"--{name}", "-1"], [str(file)]):
        with pytest.raises(ArgumentError) as error:
            parse_arguments(argv)
        assert str(error.value).startswith(f"--{name} must be ")
        assert str(error.value).endswith((", got -1", ", got -1.0"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--epochs -1", "--epochs must be 0 or more, got -1.0"),
        ("--batch_size 0", "--batch_size must be above 0, got 0"),
        ("--prefetch_factor 0", "--prefetch_factor must be above 0, got 0"),
        ("--label_smoothing 1", "--label_smoothing must be 0 or more and below 1, got 1.0"),
        ("--model_ema_decay 3", "--model_ema_decay must be 0 or more and below 1, got 3.0"),
        ("--momentum 7", "--momentum must be 0 or more and below 1, got 7.0"),
        ("--validation_fraction 1", "--validation_fraction must be between 0 and 1, got 1.0"),
        ("--freeze_bn 1.5", "--freeze_bn must be from 0 to 1, got 1.5"),
        (f"--seed {2**32}", f"--seed must be from 0 to {2**32 - 1}, got {2**32}"),
        ("--target_bits 2 -3", "--target_bits must be above 0, got -3.0"),
        ("--min_lr 5", "--min_lr must be at most --lr, 0.001, got 5"),
        ("--opt sgd --momentum 0", "--opt sgd: Nesterov momentum requires a momentum"),
        ("--search_options caution=nan", "--search_options: caution must be a finite number, got nan"),
    ],
)
def test_a_number_out_of_its_range_is_named(command: str, message: str):
    with pytest.raises(ArgumentError, match=r"^[^\n]*$") as error:
        parse_arguments(command.split())
    assert message in str(error.value)


def test_numbers_at_the_ends_of_their_ranges_are_taken():
    command = f"--seed {2**32 - 1} --label_smoothing 0 --min_lr 1e-3 --lr 1e-3 --freeze_bn 0 --bn_batches 0 --workers 0"
    found = parse_arguments(command.split())
    assert (found.run.seed, found.finetune.min_lr, found.finetune.freeze_bn) == (2**32 - 1, 1e-3, 0)
    # A script that may leave out the training.
    (recipe,) = parse_groups([OptimizerArguments], ["--epochs", "0"], "script.py", "A script.")
    assert recipe.epochs == 0


def test_an_empty_list_in_yaml_is_an_empty_list(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("controls: []")
    found = parse_arguments([str(file)])
    assert found.search.controls == parse_arguments(["--controls", "none"]).search.controls
    assert "greedy" in parse_arguments([]).search.controls
    # The card's command gives the same.
    command = shlex.split(found.command().split("run_sdq.py")[1])
    assert parse_arguments(command).to_dict() == found.to_dict()
    assert parse_arguments([str(file), "--controls", "hawq"]).search.controls == ["hawq"]
    file.write_text("lr: []")
    with pytest.raises(ArgumentError, match=r"lr takes one value, got \[\]"):
        parse_arguments([str(file)])
