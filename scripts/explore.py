"""A page to look at a quantized model: its bits, sizes and plots, and an image classified by it and by its float twin.

    pip install 'sdq-hf[demo]'
    python scripts/explore.py runs/demo/models/sdq-bitops-2      # or a Hub id; the page loads others too

As a Space it needs this file, a requirements.txt with the line `sdq-hf[demo]`, and a README.md that begins with

    ---
    title: SDQ explorer
    sdk: gradio
    app_file: explore.py
    ---

The Space's variable SDQ_MODEL names the model to start with; a folder `examples` beside this file holds images to try.
"""

import argparse
import io
import logging
import os
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
import pyarrow.parquet
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor

from sdq_hf import SDQForImageClassification
from sdq_hf.costs import bitops_text
from sdq_hf.hub.plots import figure_bits, figure_weights
from sdq_hf.packed_files import weight_file_bytes
from sdq_hf.strategy import bits_text

HERE = Path(__file__).parent
TWIN = """The float twin has the same weights, and computes without rounding and clipping of inputs. It is not the network
before quantization, which the file does not hold. The model was trained with the rounding, so its twin may be the worse
of the two."""
CSS = """
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 10px; overflow-wrap: anywhere; }
.tiles div { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 8px 12px; }
.tiles b { display: block; font-size: 1.3em; line-height: 1.4; }
#status .html-container, #head .html-container, #verdict .html-container { padding: 0; }
.failed { border-left: 4px solid #d55e00; padding: 8px 12px; overflow-wrap: anywhere; }
#image img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
@media (max-width: 700px) {
  #layers .table-wrap * { font: 11px var(--font) !important; padding-inline: 1px !important; }
  #layers th * { padding-inline: 0 !important; }
  #layers .cell-menu-button { display: none; }
}
"""


@dataclass(frozen=True)
class Loaded:
    folder: Path
    model: SDQForImageClassification
    twin: nn.Module
    processor: Any


def load(name: str, revision: str = "") -> Loaded:
    """The model in the folder or the Hub repository `name`; no code and no pickle is taken from there."""
    name, revision = name.strip(), revision.strip()
    if not name:
        raise ValueError("Give a folder, or a Hub id such as org/resnet18-sdq.")
    if Path(name).is_dir() and revision:
        raise ValueError("A folder has no revisions: leave that box empty.")
    try:
        found = Path(name)
        if not found.is_dir():
            wanted = ["*.json", "*.safetensors", "plots/*.png"]
            found = Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except HFValidationError:
        raise ValueError("It is neither a folder here nor a Hub id, such as org/resnet18-sdq.") from None
    if not (found / "config.json").exists():
        raise ValueError("It has no config.json, so it holds no model.")
    model = SDQForImageClassification.from_pretrained(found).eval()
    return Loaded(found, model, model.float_twin(), AutoImageProcessor.from_pretrained(found))


def describe(model: SDQForImageClassification, folder: Path) -> tuple[list[tuple[str, str, str]], pd.DataFrame]:
    """Headline figures (title, value, explanation), and the table of the layers."""
    config, strategy = model.config, model.strategy
    _, height, width = config.input_size
    size = weight_file_bytes(folder)
    floats = model.float_bytes()
    headline = [
        ("Average bits", f"{strategy.average_bits():.2f}", f"{strategy.average_bits(True):.2f} with pinned layers"),
        ("File", f"{size / 1e3:,.1f} kB", f"{floats / size:.1f}x smaller than {floats / 1e3:,.1f} kB in float32"),
        ("BitOPs", bitops_text(strategy.bitops()), "for one image: MACs x weight bits x input bits"),
        ("Network", config.architecture, f"{config.num_labels} classes, images of {height} x {width} pixels"),
    ]
    table = pd.DataFrame(
        [
            (n, _number(x.weight_bits), _number(x.activation_bits), x.num_weights, x.macs / 1e6, x.pinned)
            for n, x in strategy.items()
        ],
        columns=["layer", "weight bits", "input bits", "weights", "MMACs", "pinned"],
    )
    table["pinned"] = table["pinned"].map({True: "yes", False: ""})
    return headline, table


def _number(bits: int | tuple[int, ...]) -> int | str:
    """Bits as a number, which the table sorts by, where they are one."""
    text = bits_text(bits)
    return int(text) if text.isdigit() else text


def plots(model: SDQForImageClassification) -> tuple[Figure, Figure | None]:
    """Bits of each layer; weights of some, or None when none is quantized. Narrow, so that phones can show their text."""
    bits = figure_bits({"model": model.strategy})
    bits.axes[0].set_title("Weight bits of each layer (grey: pinned)", fontsize=10, loc="left")
    bits.set(dpi=130, figwidth=max(4.6, 0.15 * len(model.strategy) + 1))
    if not model.quantized_layers():
        return bits, None
    weights = figure_weights(model)
    panels = [axis for axis in weights.axes if axis.axison]
    grid = weights.add_gridspec(len(panels), 1)
    for i, axis in enumerate(panels):
        axis.set_subplotspec(grid[i])
    weights.set(dpi=130, figwidth=4.6, figheight=1.3 * len(panels))
    return bits, weights


@torch.inference_mode()
def classify(
    model: SDQForImageClassification, twin: nn.Module, processor: Any, image: Image.Image
) -> tuple[dict[str, float], dict[str, float], str]:
    """Label -> probability of the model and of its float twin, and a sentence that compares them."""
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    first, second = model(pixels).logits[0].softmax(-1), twin(pixels)[0].softmax(-1)
    names = [model.config.id2label[i] for i in range(len(first))]
    count = Counter(names)  # ImageNet calls two different classes "crane"
    names = [name if count[name] == 1 else f"{name} ({i})" for i, name in enumerate(names)]
    top, twin_top, gap = names[int(first.argmax())], names[int(second.argmax())], (first - second).abs()
    verdict = f"Both say {top}." if top == twin_top else f"They disagree: the model says {top}, its twin {twin_top}."
    largest = f"{100 * gap.max().item():.1f} points, of {names[int(gap.argmax())]}"
    verdict += f" The largest difference of a probability is {largest}."
    return dict(zip(names, first.tolist(), strict=True)), dict(zip(names, second.tolist(), strict=True)), verdict


def example_images() -> list[Image.Image]:
    """Those in the folder `examples` beside this file; without one, in a checkout, some of the bundled sample."""
    files: list[Any] = [
        path for path in sorted((HERE / "examples").glob("*")) if path.suffix in (".png", ".jpg", ".jpeg")
    ]
    sample = HERE / "data" / "fashion_mnist_sample" / "test.parquet"
    if not files and sample.exists():
        rows = pyarrow.parquet.read_table(sample, columns=["image"]).slice(0, 8)["image"].to_pylist()
        files = [io.BytesIO(row["bytes"]) for row in rows]
    return [Image.open(file) for file in files]


def failed(what: str, error: Exception | str) -> str:
    text = " ".join(f"{what} {error}".split())
    return f'<p class="failed">{escape(text if len(text) <= 400 else text[:397] + "...")}</p>'


def show(name: str, revision: str) -> list[Any]:
    """What the button Load changes, in the order of `shown` in `build`. A failure changes the first only."""
    try:
        new = load(name, revision)
        headline, table = describe(new.model, new.folder)
        bits, weights = plots(new.model)
        paths = [new.folder / "plots" / f"{picture}.png" for picture in ("descent", "accuracy")]
        pictures = [Image.open(path) if path.exists() else None for path in paths]
    except Exception as error:  # whatever is wrong with a model is one line for the visitor, and a trace in the log
        logging.exception("not loaded: %r", name)
        return [failed(f"{name} could not be loaded." if name else "", error), *[gr.skip()] * 11]
    tiles = "".join(f"<div>{escape(a)}<b>{escape(b)}</b><small>{escape(c)}</small></div>" for a, b, c in headline)
    head = f'<p>{escape(f"{name} {revision}")}</p><div class="tiles">{tiles}</div>'
    search = gr.Tab(visible=any(pictures))
    return [
        "",
        new,
        head,
        bits,
        table.style.format(thousands=",", precision=3),
        weights,
        search,
        *pictures,
        None,
        None,
        "",
    ]


def compare(loaded: Loaded | None, image: Image.Image | None) -> tuple[Any, Any, str]:
    """What the button Classify changes."""
    if loaded is None or image is None:
        return None, None, failed("", "Load a model first." if loaded is None else "Give an image first.")
    try:
        first, second, verdict = classify(loaded.model, loaded.twin, loaded.processor, image)
        return first, second, escape(verdict)
    except Exception as error:
        logging.exception("not classified")
        return None, None, failed("The image could not be classified.", error)


def build(start: str | None = None) -> gr.Blocks:
    """The page; `start` is the folder or Hub id of the model that it opens with."""
    with gr.Blocks(title="SDQ explorer", analytics_enabled=False) as demo:
        gr.Markdown(
            "# SDQ explorer\nHow many bits each layer of a quantized classifier has, and what it makes of an image."
        )
        with gr.Row(equal_height=True):
            name = gr.Textbox(start, label="Model: folder or Hub id", scale=5, min_width=300, elem_id="model")
            revision = gr.Textbox(label="Revision", placeholder="main", min_width=140, elem_id="revision")
            load_button = gr.Button("Load", variant="primary", min_width=140, elem_id="load")
        status, loaded = gr.HTML(elem_id="status"), gr.State()
        head = gr.HTML(elem_id="head")
        with gr.Tab("Bits"):
            bits = gr.Plot(show_label=False)
            widths: list[str | int] = ["26%", "14%", "12%", "17%", "14%", "17%"]
            layers = gr.Dataframe(
                show_label=False, interactive=False, wrap=True, column_widths=widths, elem_id="layers"
            )
        with gr.Tab("Weights"):
            weights = gr.Plot(show_label=False)
        with gr.Tab("Search", visible=False) as search, gr.Row():
            pictures = [
                gr.Image(show_label=False, format="png", buttons=["fullscreen"], min_width=300) for _ in range(2)
            ]
        with gr.Tab("Classify"), gr.Row():
            with gr.Column():
                image = gr.Image(
                    type="pil", format="png", sources=["upload"], label="Image", height=260, elem_id="image"
                )
                classify_button = gr.Button("Classify", variant="primary", elem_id="classify")
                if examples := example_images():
                    gr.Examples([[example] for example in examples], image, label="Images to try")
            with gr.Column(scale=2):
                with gr.Row():
                    both = [
                        gr.Label(label=text, num_top_classes=5, min_width=240, elem_id=key)
                        for key, text in (("quantized", "Quantized model"), ("twin", "Float twin"))
                    ]
                verdict = gr.HTML(elem_id="verdict")
                gr.Markdown(TWIN)
        shown = [status, loaded, head, bits, layers, weights, search, *pictures, *both, verdict]
        gr.on([load_button.click, name.submit, *([demo.load] if start else [])], show, [name, revision], shown)
        classify_button.click(compare, [loaded, image], [*both, verdict])
    return demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=os.environ.get("SDQ_MODEL"), help="folder or Hub id to start with")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    options = parser.parse_args()
    # The default theme's fonts would be fetched from another site.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    # Every visitor's model is in memory, so their number is limited.
    build(options.model).launch(server_port=options.port, theme=theme, css=CSS, state_session_capacity=32)


if __name__ == "__main__":
    main()
