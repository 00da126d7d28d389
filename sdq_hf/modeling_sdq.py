"""SDQForImageClassification: a timm image classifier whose layers have learned bitwidths."""

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from . import backbones as backbones  # registers our timm names
from .configuration_sdq import SDQConfig
from .hf_quantizer import SDQHfQuantizer, SDQQuantizationConfig
from .layers import (
    QuantizedLayer,
    apply_strategy,
    attach,
    count_macs,
    quantizable_layers,
    quantized_layers,
)
from .strategy import FLOAT_BITS, LayerBits, Strategy


def create_backbone(architecture: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with near names in the error for a name that timm does not know."""
    name = architecture.split(".")[0]
    if not timm.is_model(name):
        known = timm.list_models()
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f" Near names: {', '.join(near)}." if near else ""
        raise ValueError(f"Unknown timm model {architecture!r}.{hint} `timm.list_models()` lists {len(known)} names.")
    return timm.create_model(architecture, **kwargs)


class SDQForImageClassification(PreTrainedModel):
    """A timm classifier with a weight and an input quantizer on each conv and linear layer.

    `model.timm_model` is timm's own module tree. `model.strategy` tells the bits, `model.set_strategy` changes them.
    """

    config_class = SDQConfig
    config: SDQConfig
    base_model_prefix = "timm_model"
    main_input_name = "pixel_values"
    model_tags = ["sdq"]
    accepts_loss_kwargs = False

    def __init__(self, config: SDQConfig):
        super().__init__(config)
        self.timm_model = create_backbone(
            config.architecture, pretrained=False, num_classes=config.num_labels, **config.model_args
        )
        strategy = self._initial_strategy() if config.strategy is None else Strategy.from_json(config.strategy)
        self._attach(strategy)
        config.strategy = strategy.to_json()
        self.post_init()

    # Construction ------------------------------------------------------------------------------------------------

    @classmethod
    def from_timm(
        cls,
        architecture: str,
        num_labels: int | None = None,
        pretrained: bool = False,
        checkpoint_path: str | os.PathLike | None = None,
        id2label: Mapping[int, str] | None = None,
        model_args: Mapping[str, Any] | None = None,
        img_size: int | None = None,
        **config_kwargs: Any,
    ) -> "SDQForImageClassification":
        """A quantized model from a timm model and its float weights.

        Args:
            architecture: timm name, ours (`resnet20_cifar`) included.
            num_labels: size of the head; default: that of the timm model.
            pretrained: load timm's pretrained weights. checkpoint_path: load float weights from a file, as in timm.
            id2label: label names; sets num_labels.
            model_args: further arguments of `timm.create_model`, e.g. `{"in_chans": 1}`.
            img_size: side of the square images in pixels; default: the model's own.
            config_kwargs: fields of `SDQConfig`.

        Raises `ValueError` for an unknown model, with near names.
        """
        if id2label is not None:
            num_labels = len(id2label)
        head = {} if num_labels is None else {"num_classes": num_labels}
        source = create_backbone(
            architecture,
            pretrained=pretrained,
            checkpoint_path=os.fspath(checkpoint_path or ""),
            **head,
            **(model_args or {}),
        )
        return cls.from_float(
            source, architecture, id2label=id2label, model_args=model_args, img_size=img_size, **config_kwargs
        )

    @classmethod
    def from_float(
        cls,
        source: nn.Module,
        architecture: str,
        id2label: Mapping[int, str] | None = None,
        model_args: Mapping[str, Any] | None = None,
        img_size: int | None = None,
        **config_kwargs: Any,
    ) -> "SDQForImageClassification":
        """A quantized model with the weights of `source`, a float timm model called `architecture`."""
        pretrained_cfg = dict(getattr(source, "pretrained_cfg", None) or {})
        data = timm.data.resolve_data_config(pretrained_cfg=pretrained_cfg, model=source)
        channels = (model_args or {}).get("in_chans", data["input_size"][0])
        size = (img_size, img_size) if img_size else tuple(data["input_size"][1:])
        pretrained_cfg.update(data, input_size=(channels, *size), num_classes=getattr(source, "num_classes", 0))
        for field in ("mean", "std"):
            pretrained_cfg[field] = _to_channels(pretrained_cfg[field], channels)
        labels = (
            {"id2label": {int(k): v for k, v in id2label.items()}, "label2id": {v: int(k) for k, v in id2label.items()}}
            if id2label is not None
            else {"num_labels": getattr(source, "num_classes", 0)}
        )
        config = SDQConfig(
            architecture=architecture,
            model_args=dict(model_args or {}),
            pretrained_cfg=_plain(pretrained_cfg),
            **labels,
            **config_kwargs,
        )
        model = cls(config)
        model.load_float_state(source.state_dict())
        return model

    def _initial_strategy(self) -> Strategy:
        """Top of the ladder; first and last layer and pins at their bits."""
        config, layers = self.config, quantizable_layers(self.timm_model)
        try:
            macs = count_macs(self.timm_model, config.input_size)
        except Exception as error:
            raise ValueError(
                f"{config.architecture} does not run on images of size {config.input_size} "
                f"(channels, height, width): {error}"
            ) from error
        names = list(layers)
        result = {}
        for name in names:
            is_end = name in (names[0], names[-1])
            pin = config.pinned_bits(name)
            bits = pin if pin is not None else config.first_last_bits if is_end else max(config.candidates)
            if bits != FLOAT_BITS and macs[name] == 0:
                raise ValueError(
                    f"Layer {name!r} of {config.architecture} is never called: its weight is unused, or read past its "
                    f"forward, where no quantizer can stand. Keep it float with pins={{{name!r}: {FLOAT_BITS}}}."
                )
            activation_bits = config.first_last_bits if is_end else config.activation_bits
            if bits == FLOAT_BITS:
                activation_bits = FLOAT_BITS
            weights = sum(p.numel() for key, p in layers[name].named_parameters() if key == "weight")
            result[name] = LayerBits(bits, activation_bits, weights, macs[name], is_end or pin is not None)
        for pattern in config.pins:
            if not any(config.pinned_bits(name) is not None for name in names):
                raise ValueError(f"pins: no layer of {config.architecture} matches {pattern!r}, e.g. {names[:3]}.")
        if not any(not layer.pinned for layer in result.values()):
            raise ValueError(f"{config.architecture} has no layer left to search: all {len(names)} are pinned.")
        return Strategy.of(result)

    def _attach(self, strategy: Strategy) -> None:
        layers = quantizable_layers(self.timm_model)
        for name in strategy:
            if name not in layers:
                raise ValueError(f"The strategy has a layer {name!r} that {self.config.architecture} lacks.")
        for name, module in layers.items():
            if name not in strategy:
                raise ValueError(f"The strategy lacks the layer {name!r} of {self.config.architecture}.")
            if strategy[name].weight_bits != FLOAT_BITS:
                attach(module, name, strategy[name], self.config.weight_quantizer, self.config.weight_grid)

    # Bits --------------------------------------------------------------------------------------------------------

    @property
    def strategy(self) -> Strategy:
        """Bits of every layer; a value, read from the configuration."""
        return Strategy.from_json(self.config.strategy or [])

    def set_strategy(self, strategy: Strategy | int | Mapping[str, int]) -> None:
        """Change weight bits: a `Strategy`, one number for every searchable layer, or layer name -> bits.

        A layer whose bits change gets a scale fitted to its weights; the others keep theirs. Raises `KeyError` for an
        unknown layer, `ValueError` for bits that are not possible.
        """
        if not isinstance(strategy, Strategy):
            strategy = self.strategy.with_bits(strategy)
        current = self.strategy
        for name, layer in strategy.items():
            if (layer.weight_bits == FLOAT_BITS) != (current[name].weight_bits == FLOAT_BITS):
                raise ValueError(f"Layer {name!r}: whether a layer is float is decided at creation, by `pins`.")
        apply_strategy(self.timm_model, strategy)
        self.config.strategy = strategy.to_json()

    @torch.no_grad()
    def load_float_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a float timm model (its `state_dict`), fit every scale to them, and forget the steps."""
        own = self.timm_model.state_dict()
        extra = {key for key in own if ".weight_quantizer." in key or ".input_quantizer." in key}
        missing = own.keys() - extra - state.keys()
        unexpected = state.keys() - own.keys()
        if missing or unexpected:
            raise KeyError(
                f"Float weights do not fit: missing {sorted(missing)[:3]}, unexpected {sorted(unexpected)[:3]}."
            )
        self.timm_model.load_state_dict({**own, **state})
        for layer in self.quantized_layers().values():
            layer.weight_quantizer.set_bits(layer.weight_quantizer.bits, layer.weight)
            if layer.input_quantizer is not None:
                layer.input_quantizer.set_bits(layer.input_quantizer.bits)

    def float_twin(self) -> nn.Module:
        """The float timm model with this model's real weights: an independent copy, in eval mode."""
        config = self.config
        twin = create_backbone(
            config.architecture, pretrained=False, num_classes=config.num_labels, **config.model_args
        )
        own, wanted = self.timm_model.state_dict(), twin.state_dict()
        twin.load_state_dict({key: own[key] for key in wanted})
        return twin.to(self.device).eval()

    @contextmanager
    def float_mode(self) -> Iterator[None]:
        """Inside, the model computes in float: no quantizer works."""
        layers = self.quantized_layers().values()
        try:
            for layer in layers:
                layer.enabled = False
            yield
        finally:
            for layer in layers:
                layer.enabled = True

    def quantized_layers(self) -> dict[str, QuantizedLayer]:
        """Name (as in `strategy`) -> layer, of every layer that has quantizers."""
        return quantized_layers(self.timm_model)

    def is_calibrated(self) -> bool:
        """Whether every activation step has been fitted or loaded."""
        quantizers = [layer.input_quantizer for layer in self.quantized_layers().values()]
        return all(q is None or q.step.item() > 0 for q in quantizers)

    def train(self, mode: bool = True) -> "SDQForImageClassification":
        """As in torch. A loaded model has quantized weights only; training it puts real weights behind them that are
        quantized to the same numbers, so it goes on from exactly the published function."""
        if mode:
            for layer in self.quantized_layers().values():
                layer.make_latent()
        return super().train(mode)

    # Calibration -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor | Mapping[str, Tensor]], num_batches: int = 4) -> None:
        """Fit every activation step and sign to images `batches` ([B, C, H, W] each, or dicts with pixel_values).

        Layer by layer in the network's order, each seeing the quantized outputs of those before it.
        """
        first = [_pixels(batch) for batch in islice(batches, num_batches)]
        if not first:
            raise ValueError("The data has no batch: is the split empty, or smaller than one batch?")
        images = torch.cat(first).to(self.device)
        for layer in self.quantized_layers().values():
            if layer.input_quantizer is not None:
                layer.input_quantizer.set_bits(layer.input_quantizer.bits)
        training = self.training
        self.eval()(images)
        self.train(training)

    def recalibrate_batch_norm(self, batches: Iterable[Tensor | Mapping[str, Tensor]], num_batches: int = 50) -> None:
        """Gather batch-norm statistics anew under the present bits (METHOD 6.3); nothing else changes."""
        update_bn((_pixels(batch) for batch in islice(batches, num_batches)), self, device=self.device)

    # Forward -----------------------------------------------------------------------------------------------------

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """`pixel_values` [B, C, H, W], `labels` [B] (int64) -> logits [B, num_labels], and the cross-entropy loss."""
        logits = self.timm_model(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def _init_weights(self, module: nn.Module) -> None:
        # timm has initialised its modules, and every other weight comes from a file.
        pass

    # Saving ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, print_size: bool = True, **kwargs: Any) -> None:
        """Save for use: weights packed at their bits, config.json with the strategy. Prints the size (`size_report`).

        Activation steps must be fitted (`calibrate`, or any forward pass), else `ValueError` names the layer.
        """
        for name, layer in self.quantized_layers().items():
            if layer.input_quantizer is not None and layer.input_quantizer.step.item() <= 0:
                raise ValueError(
                    f"Layer {name!r}: its activation step was never fitted. Call model.calibrate(images) before saving."
                )
        quantization_config = SDQQuantizationConfig()
        self.config.quantization_config = quantization_config
        self.hf_quantizer = SDQHfQuantizer(quantization_config)
        super().save_pretrained(save_directory, **kwargs)
        if print_size:
            print(self.size_report(save_directory))

    def size_report(self, folder: str | os.PathLike) -> str:
        """One line: how large the packed weights in `folder` are, beside float32."""
        size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder) if f.endswith(".safetensors"))
        float_bytes = 4 * sum(p.numel() for p in self.parameters())
        return (
            f"Saved {folder}: {size / 1e3:,.1f} kB packed ({self.strategy.average_bits():.2f} average bits), "
            f"{float_bytes / size:.1f}x smaller than {float_bytes / 1e3:,.1f} kB in float32."
        )

    def ideal_bytes(self) -> int:
        """sum N_l b_l / 8 and 4 bytes for every number that stays float (invariant 3)."""
        packed = {f"{name}.weight" for name in quantized_layers(self.timm_model)}
        rest = sum(t.numel() * t.element_size() for k, t in self.timm_model.state_dict().items() if k not in packed)
        quantized = [x for x in self.strategy.values() if x.weight_bits != FLOAT_BITS]
        return rest + sum(x.num_weights * x.weight_bits for x in quantized) // 8


def _pixels(batch: Tensor | Mapping[str, Tensor]) -> Tensor:
    return batch["pixel_values"] if isinstance(batch, Mapping) else batch


def _to_channels(values: Iterable[float], channels: int) -> tuple[float, ...]:
    """Mean or std for another number of channels: their average, as many times as there are channels."""
    values = tuple(values)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that JSON gives back as it was: tuples become lists, empty fields are left out."""
    data = copy.deepcopy(dict(data))
    return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items() if v is not None}
