"""The models and cards that are kept in `model_cards/`: the numbers of a card are those of its model."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from torchvision.transforms.functional import normalize, to_tensor

from sdq_hf import SDQForImageClassification
from sdq_hf.hub.card import create_card
from sdq_hf.training.data import load_image_data
from tests.test_hardware_profile import model_of

FOLDERS = sorted(path.parent for path in (Path(__file__).parents[2] / "model_cards").glob("*/*/config.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@torch.no_grad()
def test_a_card_has_the_numbers_of_its_model(folder):
    model, text = SDQForImageClassification.from_pretrained(folder), (folder / "README.md").read_text()
    config, data = model.config.pretrained_cfg, load_image_data()
    split = data.splits["test"]
    pixels = torch.stack([normalize(to_tensor(image), config["mean"], config["std"]) for image in split["image"]])
    batches = pixels.to(memory_format=torch.channels_last).split(250)
    ranked = torch.cat([model(batch).logits for batch in batches]).argsort(dim=1, descending=True)
    hits = ranked == torch.tensor(split["label"])[:, None]
    found = [round(hits[:, :k].any(1).double().mean().item(), 4) for k in (1, 5)]
    # Another processor rounds sums in another way, which may move an image across a border.
    for result, value in zip(ModelCard(text).data.eval_results, found, strict=True):
        assert result.metric_value == pytest.approx(value, abs=0.002)
    for name, layer in model.strategy.items():
        assert f"| `{name}` | {layer.weight_bits} | {layer.activation_bits} | {layer.num_weights:,} |" in text
    size = (folder / "model.safetensors").stat().st_size
    assert f"this file | {size / 1e3:,.1f} kB" in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (folder / line.split("(")[1].rstrip(")")).exists()


def test_there_are_cards():
    assert len(FOLDERS) >= 2


def test_a_card_says_that_its_model_is_in_the_hardware_profile(tmp_path: Path):
    model, images = model_of()
    for name, one, says in (("float", model, False), ("powers", model.to_hardware_profile([images]), True)):
        one.save_pretrained(tmp_path / name, print_size=False)
        assert ("It is in the hardware profile" in str(create_card(one, tmp_path / name))) == says
