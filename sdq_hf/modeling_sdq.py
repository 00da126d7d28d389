"""SDQForImageClassification: a timm image classifier whose layers have learned bitwidths."""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from . import backbones as backbones  # registers our timm names
from .checkpoint import DIGEST, CheckpointError
from .configuration_sdq import SDQConfig
from .hf_quantizer import SDQHfQuantizer, SDQQuantizationConfig
from .layers import (
    QuantizedLayer,
    apply_strategy,
    attach,
    attached_layers,
    count_macs,
    input_quantizers,
    quantizable_layers,
    quantized_layers,
    quantizer_parameters,
)
from .strategy import FLOAT_BITS, LayerBits, Strategy, short, unknown_layer

# The file that lets transformers find the classes with trust_remote_code=True, without `import sdq_hf`.
REMOTE_CODE = "sdq_remote.py"
_REMOTE_SOURCE = """# The classes of the installed package sdq_hf, for `trust_remote_code=True`.
from sdq_hf import SDQConfig, SDQForImageClassification, SDQImageProcessor
"""
_HUB_OPTIONS = ("repo_id", "private", "token", "revision", "commit_message", "commit_description", "create_pr")
_AUTO_MAP = {
    "AutoConfig": "sdq_remote.SDQConfig",
    "AutoImageProcessor": "sdq_remote.SDQImageProcessor",
    "AutoModelForImageClassification": "sdq_remote.SDQForImageClassification",
}

# Inside `from_pretrained`: whether its caller allows layers of other shapes than the file's.
_LOADING: ContextVar[bool | None] = ContextVar("_LOADING", default=None)


def create_backbone(architecture: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with near names in the error for a name that timm does not know."""
    name = architecture.split(".")[0]
    if not timm.is_model(name):
        known = timm.list_models()
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f" Near names: {', '.join(near)}." if near else ""
        raise ValueError(f"Unknown timm model {architecture!r}.{hint} `timm.list_models()` lists {len(known)} names.")
    try:
        return timm.create_model(architecture, **kwargs)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"timm cannot make {architecture!r} with {short(kwargs)}: {error}") from error


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
    # Integers times a scale stay what they are at any precision of the rest.
    _keep_in_fp32_modules_strict = ["weight_quantizer", "input_quantizer"]
    _keys_to_ignore_on_load_unexpected = [DIGEST]

    def __init__(self, config: SDQConfig):
        super().__init__(config)
        self.timm_model = create_backbone(
            config.architecture, pretrained=False, num_classes=config.num_labels, **config.model_args
        )
        # Layers that a loaded file cannot fill, since the number of classes was changed: names as in `named_modules()`.
        self.new_layers: list[str] = []
        given = config.strategy
        strategy = self._initial_strategy() if given is None else self._fitting(Strategy.from_json(given))
        self._attach(strategy)
        config.strategy = strategy.to_json()
        if self.quantized_layers():
            # As for a model of any other quantization method that was loaded quantized.
            config.quantization_config = SDQQuantizationConfig()
            self.hf_quantizer = SDQHfQuantizer(config.quantization_config)
            self.is_quantized, self.quantization_method = True, "sdq"
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

    def _fitting(self, strategy: Strategy) -> Strategy:
        """`strategy` of a configuration, if it has the layers of the network and their sizes.

        A head of another size is a new head: `num_labels` was changed, and its sizes follow.
        """
        architecture, layers = self.config.architecture, quantizable_layers(self.timm_model)
        for name in strategy:
            if name not in layers:
                raise ValueError(f"strategy of {architecture}: {unknown_layer(name, list(layers))}")
        heads = cast(Any, self.timm_model).get_classifier()
        heads = heads if isinstance(heads, tuple | list) else (heads,)
        changed = dict(strategy)
        for name, module in layers.items():
            if name not in strategy:
                raise ValueError(f"strategy of {architecture}: it lacks the layer {name!r}.")
            layer, weights = strategy[name], cast(Tensor, module.weight).numel()
            if layer.num_weights == weights:
                continue
            if module not in heads:
                raise ValueError(
                    f"strategy of {architecture}: layer {name!r} has {weights} weights, not {layer.num_weights}."
                )
            self.new_layers.append(f"{self.base_model_prefix}.{name}")
            macs = layer.macs * weights // layer.num_weights if layer.num_weights else 0
            changed[name] = replace(layer, num_weights=weights, macs=macs)
        if self.new_layers and _LOADING.get() is False:
            raise ValueError(
                f"The head {self.new_layers[0]!r} of the file is not for the {self.config.num_labels} classes asked for. "
                "With ignore_mismatched_sizes=True it is made anew, to be trained."
            )
        return Strategy.of(changed)

    def _attach(self, strategy: Strategy) -> None:
        for name, module in quantizable_layers(self.timm_model).items():
            if not strategy[name].is_float:
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
        self._forget_steps()

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
        layers = attached_layers(self.timm_model).values()
        try:
            for layer in layers:
                layer.enabled = False
            yield
        finally:
            for layer in layers:
                layer.enabled = True

    def quantized_layers(self) -> dict[str, QuantizedLayer]:
        """Name (as in `strategy`) -> layer, of every layer whose weights are quantized."""
        return quantized_layers(self.timm_model)

    def is_calibrated(self) -> bool:
        """Whether every activation step has been fitted or loaded."""
        return all(quantizer.step.item() > 0 for quantizer in input_quantizers(self.timm_model).values())

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
        self._forget_steps()
        training = self.training
        self.eval()(images)
        self.train(training)

    def _forget_steps(self) -> None:
        for quantizer in input_quantizers(self.timm_model).values():
            quantizer.set_bits(quantizer.bits)

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
        # timm has initialised its modules, or every weight comes from a file: but for a new head's.
        if _LOADING.get() and isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], *args: Any) -> None:
        # That of a packed file, if Trainer loads one; `from_pretrained` has compared it.
        state_dict.pop(DIGEST, None)
        super()._load_from_state_dict(state_dict, *args)

    # Types -------------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """That of the computation; scales and steps are float32 always."""
        own = {id(parameter) for _, parameter in quantizer_parameters(self)}
        return next(p.dtype for p in self.parameters() if p.is_floating_point() and id(p) not in own)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "SDQForImageClassification":
        # All of torch's ways to cast come by here.
        before = torch.empty(0, dtype=torch.float32)
        after = fn(before).dtype
        if getattr(self, "is_quantized", False) and torch.finfo(after).bits < torch.finfo(before.dtype).bits:
            raise ValueError(
                f"Casting to {after} would change the scales, and so the numbers that were published. Compute in it under "
                f"torch.autocast, load with from_pretrained(..., dtype={after}), or call dequantize() first."
            )
        return super()._apply(fn, *args, **kwargs)

    def float(self, *args: Any) -> "SDQForImageClassification":
        """Nothing to do for a model that computes in float32; otherwise as in transformers."""
        return self if self.dtype == torch.float32 else super().float(*args)

    def dequantize(self, dtype: torch.dtype | None = None) -> "SDQForImageClassification":
        """Turn the model, in place, into a float model with the same logits, and return it.

        The quantized weights stand in ordinary layers then, as float numbers; files are as large as a float model's. Inputs
        are still rounded, since the logits depend on it; `float_twin()` gives timm's model without any rounding.
        """
        if not self.quantized_layers():
            return self
        super().dequantize(dtype=dtype)
        # Nothing is left for a search.
        strategy = {name: replace(layer, weight_bits=FLOAT_BITS, pinned=True) for name, layer in self.strategy.items()}
        self.config.strategy = Strategy.of(strategy).to_json()
        return self if dtype is None else self.to(dtype)

    # Loading -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *model_args: Any, **kwargs: Any) -> Any:
        """As in transformers, from a folder or a Hub id. The file is looked over first (`sdq_hf.checkpoint`).

        With other `num_labels` and `ignore_mismatched_sizes=True` the head is made anew. With `dtype` the network computes in
        that type, and scales stay float32.

        Raises `ValueError` naming the field or the tensor for a configuration or a file that is damaged or does not fit.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)
        token = _LOADING.set(bool(kwargs.get("ignore_mismatched_sizes", False)))
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError) as error:
            # What a wrong value of one of the many fields that transformers has may end in.
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: config.json has a value that transformers cannot read: {error!r}"
            ) from error
        finally:
            _LOADING.reset(token)
        new = tuple(f"{name}." for name in model.new_layers)
        # A file of a quantized model was compared with its configuration already; one of float weights was not.
        missing = [name for name in sorted(info["missing_keys"]) if not name.startswith(new)]
        if missing:
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: the file lacks {missing[0]!r}, which config.json asks for."
            )
        return (model, info) if wants_info else model

    # Saving ------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        print_size: bool = True,
        remote_code: bool = False,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save for use: weights packed at their bits, config.json with the strategy. Prints the size (`size_report`).

        With `remote_code` the folder can be loaded with `trust_remote_code=True` in place of `import sdq_hf`; the package
        must be installed all the same. `push_to_hub`, and `repo_id` and further options with it, as in transformers.

        Activation steps must be fitted (`calibrate`, or any forward pass), else `ValueError` names the layer.
        """
        for layer in self.quantized_layers().values():
            layer.weight_quantizer.keep_positive(layer.weight_quantizer.scale)
        for name, quantizer in input_quantizers(self.timm_model).items():
            quantizer.keep_positive(quantizer.step)
            if quantizer.step.item() <= 0:
                raise ValueError(
                    f"Layer {name!r}: its activation step was never fitted. Call model.calibrate(images) before saving."
                )
        hub_options = {key: kwargs.pop(key) for key in _HUB_OPTIONS if key in kwargs}
        remote = Path(save_directory) / REMOTE_CODE
        # A loaded configuration may have a map whose file is elsewhere.
        self.config.__dict__.pop("auto_map", None)
        if remote_code:
            self.config.auto_map = dict(_AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)
        if remote_code:
            remote.write_text(_REMOTE_SOURCE)
        else:
            remote.unlink(missing_ok=True)
        if print_size:
            print(self.size_report(save_directory))
        if push_to_hub:
            from .hub.publish import publish_folder

            publish_folder(Path(save_directory), hub_options.pop("repo_id", Path(save_directory).name), **hub_options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish the model in one commit, with a card and pictures; gives the commit's address.

        Args:
            repo_id: such as `org/resnet18-sdq`; made when it is missing.
            options: `private`, `token`, `revision` (a branch, made when it is missing), `commit_message`,
                `commit_description`, `create_pr`, `max_shard_size` as in transformers; `card`, to be used in place of the
                one that is written; `license` for that one; `remote_code` as in `save_pretrained`.

        Raises `PublishError` when the Hub cannot be reached or refuses. A model that `scripts/run_sdq.py` has made is better
        published from its folder (`sdq-hf push`): the card there has its results.
        """
        from .hub.publish import publish_model

        return publish_model(self, repo_id, **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing: the code is in the package, and no copy of it is to be saved with a model."""

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
