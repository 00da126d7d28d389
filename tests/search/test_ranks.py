"""A search in two processes: one strategy, that of one process with twice the batch, or an error that names the rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from tests.search import rank_worker
from tests.search.rank_worker import BATCH, network

TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
# `--num_processes 2 --cpu` alone starts one process.
CONFIG = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 2\n"


def launch(folder, launcher, *scenarios):
    """What both ranks wrote, after a look at the size of their world."""
    command = [sys.executable, *launcher, "-m", "tests.search.rank_worker", str(folder), *scenarios]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [(rank["world"], rank["backend"]) for rank in found] == [(2, "gloo")] * 2
    return found


def alone(batch_size, accumulated=1, **options):
    """The search in this process."""
    try:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
        return rank_worker.run(accelerator, network(), batch_size, **options)
    finally:
        # Accelerate keeps what a process was first asked for.
        for state in (AcceleratorState, GradientState):
            state._reset_state()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("ranks"), TORCHRUN, "all")


def steps_of(run):
    return [(move["batch"], move["layer"], move["to"]) for move in run["moves"]]


def test_frozen_weights_give_two_ranks_what_one_process_finds_with_twice_the_batch(ranks):
    first, second = (rank["frozen"] for rank in ranks)
    assert len(first["seen"]) > 20
    assert first == second
    expected = alone(2 * BATCH, weight_lr=0.0)
    assert (first["strategies"], steps_of(first)) == (expected["strategies"], steps_of(expected))
    damages = [[move["damage"] for move in run["moves"]] for run in (first, expected)]
    assert damages[0] == pytest.approx(damages[1], rel=1e-4)


def test_trained_weights_give_two_ranks_what_one_process_finds_with_two_batches_an_update(ranks):
    """Not with twice the batch: Adam makes whole steps of the float noise in small gradients, and rounding does the rest."""
    first, second = (rank["search"] for rank in ranks)
    assert first == second
    expected = alone(BATCH, accumulated=2)
    assert (first["strategies"], steps_of(first)) == (expected["strategies"], steps_of(expected))


def test_batches_that_are_accumulated_are_one_large_batch():
    found, expected = alone(BATCH, accumulated=2, weight_lr=0.0), alone(2 * BATCH, weight_lr=0.0)
    assert (found["strategies"], steps_of(found)) == (expected["strategies"], steps_of(expected))


def test_accelerate_launch_is_torchrun(tmp_path, ranks):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    assert [rank["search"] for rank in launch(tmp_path, launcher)] == [rank["search"] for rank in ranks]


def test_ranks_that_fit_activation_steps_to_their_own_images_take_those_of_the_first(ranks):
    assert ranks[0]["own steps"] == ranks[1]["own steps"]


def test_steps_that_each_rank_would_fit_to_its_own_first_batch_are_refused(ranks):
    for rank in ranks:
        for said in rank["unfitted"]:
            assert said.startswith("An activation step is not fitted")
            assert said.endswith("with the same images in every process., False")


@pytest.mark.parametrize(
    ("cause", "what"),
    [
        ("seed", "batch 0: rank 1 has other draws"),
        ("weights", "batch 0: rank 1 has other weights"),
        ("estimates", "batch 7: rank 1 has other estimates"),
        ("decision", "rank 1 has other bits"),
        ("random strategies", "batch 0: rank 1 has other strategies"),
        ("greedy strategies", "batch 0: rank 1 has other strategies"),
    ],
)
def test_a_rank_that_diverges_is_named_on_every_rank(ranks, cause, what):
    assert what in ranks[0][cause]
    assert ranks[0][cause] == ranks[1][cause]
    assert "\n" not in ranks[0][cause]


@pytest.mark.parametrize("method", ["random", "greedy", "table", "fracbits"])
def test_rivals_end_with_one_strategy_on_both_ranks(ranks, method):
    first, second = (rank[method] for rank in ranks)
    assert first == second
    assert len(first) == 2
