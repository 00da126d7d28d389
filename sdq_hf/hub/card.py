"""The model card: written from `model_cards/template.md`, with what the model knows of itself and what its run measured."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..checkpoint import DIGEST, stored_digest
from ..costs import bitops_text
from ..modeling_sdq import SDQForImageClassification
from ..packed_files import REMOTE_CODE, weight_file_bytes
from ..strategy import FLOAT_BITS, bits_text

# The picture's file in the folder `plots/`, and what it shows.
PICTURES = {
    "bits": "Bits of each layer, above the number of its weights",
    "descent": "The search's way down: cost, and bits of each layer, over its batches",
    "accuracy": "Accuracy and KL divergence against file size and BitOPs, for all budgets of the run",
    "weights": "Weights of some layers, and their levels",
}
_ORIGINS = {
    "sdq": "learned by SDQ",
    "uniform": "the same for all searched layers (not learned)",
    "random": "drawn at random",
    "size": "set by the size of each layer alone (not learned)",
    "greedy": "chosen by the quantization error per saved cost (not learned)",
    "table": "chosen by a table of the KL divergence that each layer costs at each bitwidth",
    "hawq": "chosen by the Hessian's trace (HAWQ)",
    "clado": "chosen by pairwise loss changes of layers (CLADO)",
    "fracbits": "learned as fractional bitwidths (FracBits)",
    "edmips": "learned as a softmax over bitwidths (EdMIPS)",
}


def main_method(rows: Sequence[Mapping[str, Any]]) -> str:
    """The method that a run is about: that of its first quantized row; the others are there to compare with.

    Raises `ValueError` where there is none.
    """
    methods = [row["method"] for row in rows if row["method"] != "float"]
    if not methods:
        raise ValueError("The run has no row of a quantized model.")
    return methods[0]


@dataclass
class RunFacts:
    """What a card says about the run of `scripts/run_sdq.py` that made its model.

    results: the contents of results.json. name: the model's row there. revisions: row -> branch, of the rows that are
    published in the same repository.
    """

    results: Mapping[str, Any]
    name: str
    revisions: Mapping[str, str] = field(default_factory=dict)

    @property
    def row(self) -> Mapping[str, Any]:
        return next(row for row in self.results["rows"] if row["name"] == self.name)


_TAGS = ("sdq", "mixed-precision", "quantization", "timm", "image-classification")


def placeholder(model: SDQForImageClassification) -> str:
    """The Hub id in a card of a model that is not published yet; publishing replaces it."""
    return f"your-name/{model.config.architecture.split('.')[0]}-sdq"


def create_card(
    model: SDQForImageClassification,
    folder: str | Path,
    run: RunFacts | None = None,
    license: str | None = None,
    revision: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """The card of `model`, saved in `folder`, where its pictures stand in `plots/`.

    Args:
        run: the run that made it; without one the card claims no accuracy.
        license: of the weights, a Hub identifier; default: what timm says of its pretrained weights, where there are any.
        revision: the branch that the card is for.
        tags: further ones, beside ours.
    """
    folder, config, strategy = Path(folder), model.config, model.strategy
    repo_id = placeholder(model)
    pictures = [
        {"path": f"plots/{name}.png", "text": text}
        for name, text in PICTURES.items()
        if (folder / "plots" / f"{name}.png").exists()
    ]
    facts: dict[str, Any] = {} if run is None else _of_run(run, repo_id)
    return ModelCard.from_template(
        _metadata(model, folder, run, license, tags),
        template_path=str(_template()),
        title=repo_id.split("/")[1],
        repo_id=repo_id,
        revision_argument=f', revision="{revision}"' if revision else "",
        architecture=f"`{config.architecture}`",
        base_model=config.base_model,
        image_size=" x ".join(str(n) for n in config.input_size[1:]) + " pixels",
        num_labels=config.num_labels,
        origin=_ORIGINS.get(run.row["method"], "") if run else "listed below",
        average_bits=strategy.average_bits(),
        average_bits_with_pinned=strategy.average_bits(include_pinned=True),
        activation_bits=_activation_bits(model),
        float_bytes=model.float_bytes(),
        ideal_bytes=model.ideal_bytes(),
        file_bytes=weight_file_bytes(folder),
        bitops=bitops_text(strategy.bitops()),
        strategy=strategy,
        hardware_profile=config.scales == "power_of_two",
        packed=bool(model.quantized_layers()),
        pictures=pictures,
        remote_code=(folder / REMOTE_CODE).exists(),
        kilobytes=lambda size: f"{size / 1e3:,.1f} kB",
        bits=bits_text,
        **facts,
    )


def _template() -> Path:
    """In a checkout beside the cards made with it; in an installed package beside this file."""
    packaged = Path(__file__).with_name("template.md")
    return packaged if packaged.exists() else Path(__file__).parents[2] / "model_cards" / "template.md"


def _activation_bits(model: SDQForImageClassification) -> str:
    found = sorted({layer.activation_bits for layer in model.strategy.values()})
    return " or ".join("float" if bits == FLOAT_BITS else f"{bits} bits" for bits in found)


def _of_run(run: RunFacts, repo_id: str) -> dict[str, Any]:
    results, data, arguments = run.results, run.results["data"], run.results["arguments"]
    rows = []
    for row in results["rows"]:
        label = row["name"]
        if label in run.revisions:
            label = f"[{label}](https://huggingface.co/{repo_id}/tree/{run.revisions[label]})"
        if row["name"] == run.name:
            label = f"**{label}** (this model)"
        rows.append({**row, "label": label, "bitops_text": bitops_text(row["bitops"])})
    share = run.row["top1"] / 100
    return {
        "rows": rows,
        "dataset": data["name"],
        "test_images": data["test_images"],
        "length": _length(arguments),
        "float_origin": _float_origin(arguments),
        "train_images": data.get("train_images", "streamed"),
        "kd": arguments["kd"],
        "seed": arguments["seed"],
        "standard_error": 100 * math.sqrt(share * (1 - share) / data["test_images"]),
        "command": results["command"],
        "device": results["device"],
        "processes": results["processes"],
        "versions": results["versions"],
    }


def _length(arguments: Mapping[str, Any]) -> str:
    """How long the fine-tune of a run was; empty where there was none."""
    steps, epochs = arguments.get("max_steps"), arguments["epochs"]
    if not epochs:
        return ""
    return f"{steps} updates" if steps else f"{epochs:g} epochs"


def _float_origin(arguments: Mapping[str, Any]) -> str:
    """Where a run's float network came from, if not from the Hub; goes on from "The float network"."""
    checkpoint, start = arguments.get("checkpoint"), arguments.get("pretrained_path")
    epochs, steps = arguments.get("teacher_epochs"), arguments.get("teacher_max_steps")
    # Epochs that are not given are 0 for a checkpoint, which has the head of the classes.
    trained = bool(steps or epochs or (epochs is None and not checkpoint))
    if file := checkpoint or start:
        text = f"came from the file `{Path(file).name}`"
        return f"{text}, and was trained in the same run" if trained else text
    if arguments.get("pretrained"):
        return "came from timm's pretrained weights"
    return "was trained from scratch in the same run" if trained else "was not trained"


def with_tags(own: Iterable[str], more: str | Iterable[str]) -> list[str]:
    """Tags of a card and further ones, each once."""
    return list(dict.fromkeys([*own, *([more] if isinstance(more, str) else more)]))


def _metadata(
    model: SDQForImageClassification, folder: Path, run: RunFacts | None, license: str | None, tags: Sequence[str]
) -> ModelCardData:
    config, weights = model.config, stored_digest(folder)
    base: dict[str, Any] = (
        {"base_model": config.base_model, "base_model_relation": "quantized"} if config.base_model else {}
    )
    if weights:
        # Of which weights the card tells: see `publish_folder`.
        base[DIGEST] = weights
    evaluated: dict[str, Any] = {}
    if run is not None:
        data = run.results["data"]
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=data["hub_id"] or data["name"],
                dataset_name=data["name"],
                dataset_split="test",
                metric_type=metric,
                metric_name=name,
                metric_value=round(run.row[key] / 100, 4),
            )
            for metric, name, key in (("accuracy", "Top-1", "top1"), ("top_5_accuracy", "Top-5", "top5"))
        ]
        evaluated = {"eval_results": results, "model_name": placeholder(model).split("/")[1]}
        if data["hub_id"]:
            evaluated["datasets"] = [data["hub_id"]]
    return ModelCardData(
        library_name="sdq_hf",
        pipeline_tag="image-classification",
        license=license or ((config.pretrained_cfg or {}).get("license") if config.base_model else None),
        tags=with_tags(_TAGS, tags),
        metrics=["accuracy"],
        **base,
        **evaluated,
    )


def with_repo_id(card: str, repo_id: str) -> str:
    """The text of a card with its placeholder, in snippets and links, replaced by `repo_id`."""
    text = re.sub(r"your-name/[\w.-]+-sdq", repo_id, card)
    return re.sub(r"^# [\w.-]+-sdq$", f"# {repo_id.split('/')[-1]}", text, count=1, flags=re.MULTILINE)


def python_snippets(card: str) -> list[str]:
    """The Python code of a card, block by block."""
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
