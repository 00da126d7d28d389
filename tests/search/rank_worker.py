"""One rank of the searches in test_ranks.py: writes what it saw to FOLDER/rank<N>.json."""

import copy
import json
import sys
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from sdq_hf import SDQForImageClassification
from sdq_hf.search import SearchLog, search
from sdq_hf.search.agreement import RankError

BATCH, BUDGETS = 8, [3.5, 2.5]


def network(calibrated=True):
    """Group norm instead of batch norm: with that each rank has the statistics of its own images."""
    torch.manual_seed(0)
    model = SDQForImageClassification.from_timm("resnet8_cifar", num_labels=10, img_size=16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.GroupNorm(4, module.num_features))
    with torch.no_grad():
        model.timm_model.fc.weight.mul_(3)
    if calibrated:
        model.calibrate([torch.stack([picture["pixel_values"] for picture in pictures()])])
    return model


def pictures():
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator)} for _ in range(8 * BATCH)]


def run(accelerator, model, batch_size, **options):
    """What the search found, and of each batch what it drew from and where it stood."""
    data = accelerator.prepare(DataLoader(pictures(), batch_size=batch_size))
    log, seen = SearchLog(every=1), []

    def on_step(step):
        state = step.state_dict()
        seen.append({"moved": step.moved, "bits": state["descent"]["bits"], "update": state["update"]})

    options = {"log": log, "start_bits": 4, "on_step": on_step, "accelerator": accelerator, **options}
    found = search(copy.deepcopy(model), data, BUDGETS, **options)
    return {"strategies": [s.weight_bits for s in found], "moves": log.moves, "seen": seen}


def error_of(accelerator, model, **options):
    try:
        run(accelerator, model, BATCH, **options)
    except RankError as error:
        return str(error)
    return "none"


def unfitted(accelerator, train):
    """What is said of a first batch without calibration, and whether anything was fitted."""
    images = torch.stack([picture["pixel_values"] for picture in pictures()[:BATCH]])
    model = network(calibrated=False)
    prepared = accelerator.prepare(model).train(train)
    try:
        with torch.set_grad_enabled(train):
            prepared(pixel_values=images)
    except RuntimeError as error:
        return f"{error}, {model.is_calibrated()}"
    return "none"


def main(folder, *scenarios):
    accelerator = Accelerator(cpu=True)
    odd = accelerator.process_index == 1
    found = {"world": accelerator.num_processes, "backend": torch.distributed.get_backend()}
    model = network()
    found["search"] = run(accelerator, model, BATCH)
    if "all" in scenarios:
        found["frozen"] = run(accelerator, model, BATCH, weight_lr=0.0)
        found["own steps"] = run(accelerator, network(calibrated=False), BATCH)["strategies"]
        found["unfitted"] = [unfitted(accelerator, train) for train in (True, False)]
        found["seed"] = error_of(accelerator, model, seed=int(odd))
        # Each rank decides by itself when a layer steps down.
        found["decision"] = error_of(accelerator, model, max_draws=7 if odd else 13)
        state = {}

        def keep(step):
            if step.batch == 7:
                state.update(copy.deepcopy(step.state_dict()))
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            run(accelerator, model, BATCH, on_step=keep)
        if odd:
            next(iter(state["update"]["means"].values()))[0]["total"] += 1e-12
        found["estimates"] = error_of(accelerator, model, resume_from=state)
        if odd:
            with torch.no_grad():
                weight = next(model.parameters())
                weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0))
        found["weights"] = error_of(accelerator, model)
        rivals = {"random": {}, "greedy": {}, "table": {"images": 16}, "fracbits": {"batches": 2}}
        for method, options in rivals.items():
            options |= {"method": method, "on_step": None}
            found[method] = run(accelerator, network(), BATCH, **options)["strategies"]
        found["random strategies"] = error_of(accelerator, network(), method="random", seed=int(odd))
        floors = {"layer3.0.conv2": 4} if odd else None
        found["greedy strategies"] = error_of(accelerator, network(), method="greedy", floors=floors)
    Path(folder, f"rank{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
