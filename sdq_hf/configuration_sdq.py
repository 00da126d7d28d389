"""SDQConfig: a timm backbone, its quantizers and its strategy."""

import fnmatch
import math
import re
import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from transformers import PretrainedConfig

from .quantizers.grids import GRIDS
from .quantizers.power_of_two import SCALES
from .quantizers.weight import FORMS
from .strategy import FLOAT_BITS, Strategy, short

GRANULARITIES = ("layer", "block", "net", "kernel")


class SDQConfig(PretrainedConfig):
    r"""
    Configuration of `SDQForImageClassification`. Every field is validated on creation; a `ValueError` names the field.

    Args:
        architecture (`str`): timm name of the backbone, `resnet18` or `hf_hub`-free names of ours like `resnet20_cifar`.
        model_args (`dict`, *optional*): further arguments of `timm.create_model`, e.g. `{"in_chans": 1}`.
        num_labels, id2label, label2id: as in every transformers configuration.
        pretrained_cfg (`dict`, *optional*): timm's data configuration (`input_size`, `mean`, `std`, ...); the image
            processor reads it, and BitOPs are counted at its `input_size`.
        base_model (`str`, *optional*): Hub id of the pretrained float model that this one was made from, for the card.
        candidates (`list[int]`): bitwidths a searchable layer can have, each 1 to 8, gaps allowed (`[2, 4, 8]`).
        granularity (`str`): what shares one bitwidth in a search: "layer", "block" (timm's, as for layer decay), "net", or
            "kernel": each output channel has its own, and a scale of its own; needs the weight quantizer "lsq".
        weight_quantizer (`str`): "lsq", "dorefa" (the paper's form) or "entropy".
        weight_grid (`str`): "midrise" or "twos_complement".
        weight_scale (`str`): what has a scale of its own: a "layer", or each output "channel" (needs "lsq", and 4 bytes of
            the file for each). Layers of granularity "kernel" have one for each channel always.
        scales (`str`): "float", or "power_of_two" for hardware that shifts where others multiply: the units of weights and
            inputs are powers of two, biases are whole numbers, and batch norm is folded into the layer before it, so the
            network is one without. See `SDQForImageClassification.to_hardware_profile`.
        reparameterize (`bool`): merge the branches that RepVGG, MobileOne and their like have for training into one
            convolution each, by timm's `reparameterize_model`, and quantize that. Branches that were quantized one by one
            could not be merged.
        average_sizes (`dict[str, list[int]]`, *optional*): name of each global average pooling -> [height, width] of what it
            averages; with scales of powers of two the weights behind it are for that size. The model sets it.
        activation_bits (`int`): bits of the inputs of all layers between the first and the last, 1 to 8, or 32 for float.
        first_last_bits (`int`): bits of weights and inputs of the first and last layer, 1 to 8, or 32 for float. Those
            layers are pinned (our interpretation of the paper).
        pins (`dict[str, int]`, *optional*): pattern of layer names (as in `fnmatch`) -> weight bits that the search
            leaves alone, 1 to 8, or 32 for a layer that stays float. The last pattern that matches decides. Pairs, as
            config.json has several pins, are taken too.
        strategy (`list`, *optional*): `Strategy.to_json()`, the one truth about bits. None: top of the ladder.
    """

    model_type = "sdq"

    def __init__(
        self,
        architecture: str = "resnet18",
        model_args: dict[str, Any] | None = None,
        pretrained_cfg: dict[str, Any] | None = None,
        base_model: str | None = None,
        candidates: list[int] | tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8),
        granularity: str = "layer",
        weight_quantizer: str = "lsq",
        weight_grid: str = "midrise",
        weight_scale: str = "layer",
        scales: str = "float",
        reparameterize: bool = False,
        average_sizes: dict[str, list[int]] | None = None,
        activation_bits: int = 4,
        first_last_bits: int = 8,
        pins: Mapping[str, int] | Iterable[tuple[str, int]] | None = None,
        strategy: list[dict[str, Any]] | Strategy | None = None,
        **kwargs,
    ):
        self.architecture = architecture
        self.model_args = {} if model_args is None else model_args
        self.pretrained_cfg = pretrained_cfg
        self.base_model = base_model
        self.candidates = candidates
        self.granularity = granularity
        self.weight_quantizer = weight_quantizer
        self.weight_grid = weight_grid
        self.weight_scale = weight_scale
        self.scales = scales
        self.reparameterize = reparameterize
        self.average_sizes = average_sizes
        self.activation_bits = activation_bits
        self.first_last_bits = first_last_bits
        self.pins = _mapping(pins)
        self.strategy = strategy.to_json() if isinstance(strategy, Strategy) else strategy
        # A file from the Hub is untrusted, so everything is looked at before transformers acts on it.
        self._validate()
        _check_labels(kwargs)
        _check_method(kwargs.get("quantization_config"))
        _check_common(kwargs)
        self.model_args, self.pins = dict(self.model_args), dict(self.pins)
        self.candidates = sorted(self.candidates)
        super().__init__(**kwargs)

    def _validate(self) -> None:
        _one_of("granularity", self.granularity, GRANULARITIES)
        _one_of("weight_quantizer", self.weight_quantizer, FORMS)
        _one_of("weight_grid", self.weight_grid, GRIDS)
        _one_of("weight_scale", self.weight_scale, ("layer", "channel"))
        _one_of("scales", self.scales, SCALES)
        for field, value in (("granularity", "kernel"), ("weight_scale", "channel")):
            if getattr(self, field) == value and self.weight_quantizer != "lsq":
                raise ValueError(f"{field} {value!r} needs weight_quantizer 'lsq', got {self.weight_quantizer!r}.")
        if not isinstance(self.reparameterize, bool):
            raise ValueError(f"reparameterize must be true or false, got {short(self.reparameterize)}.")
        _check_average_sizes(self.average_sizes)
        _check_architecture(self.architecture)
        if self.base_model is not None and not isinstance(self.base_model, str):
            raise ValueError(f"base_model must be a Hub id, got {self.base_model!r}.")
        if not isinstance(self.candidates, list | tuple | set) or not self.candidates:
            raise ValueError(f"candidates must be a list of bitwidths from 1 to 8, got {short(self.candidates)}.")
        for bits in self.candidates:
            _check_bits("candidates", bits, float_allowed=False)
        if len(set(self.candidates)) != len(self.candidates):
            raise ValueError(f"candidates must differ from each other, got {short(self.candidates)}.")
        _check_bits("activation_bits", self.activation_bits)
        _check_bits("first_last_bits", self.first_last_bits)
        if not isinstance(self.pins, Mapping):
            raise ValueError(f"pins must map patterns of layer names to bits, got {short(self.pins)}.")
        if len(self.pins) > _MOST_PINS:
            raise ValueError(f"pins must be at most {_MOST_PINS} patterns, got {len(self.pins)}.")
        for pattern, bits in self.pins.items():
            if not isinstance(pattern, str):
                raise ValueError(f"pins must map patterns of layer names to bits, got the pattern {short(pattern)}.")
            _check_bits(f"pins[{pattern!r}]", bits)
        _check_model_args(self.model_args)
        check_pretrained_cfg(self.pretrained_cfg)
        if self.strategy is not None:
            for name, layer in Strategy.from_json(self.strategy).items():
                if isinstance(layer.weight_bits, tuple) and self.granularity != "kernel":
                    raise ValueError(
                        f"strategy, layer {short(name)}: weight_bits for each output channel are for granularity 'kernel', "
                        f"this one is {self.granularity!r}."
                    )

    def pinned_bits(self, name: str) -> int | None:
        """Weight bits that `pins` give layer `name`, None when no pattern matches."""
        matches = [bits for pattern, bits in self.pins.items() if fnmatch.fnmatchcase(name, pattern)]
        return matches[-1] if matches else None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; whatever is wrong with the fields is a `ValueError`.

        So is a keyword that would change a field that the weights of the file, or its strategy, were made with.
        """
        try:
            if config_dict.get("strategy") is not None and not _DECIDED.keys().isdisjoint(kwargs):
                own = cls(**config_dict)
                for field in _DECIDED:
                    if field in kwargs and kwargs[field] != getattr(own, field):
                        raise ValueError(
                            f"{field} of a saved model is {short(getattr(own, field))} and cannot be {short(kwargs[field])}: "
                            f"{_DECIDED[field]}"
                        )
            return super().from_dict(config_dict, **kwargs)
        except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError) as error:
            raise ValueError(f"config.json: a field has a value that transformers cannot read: {error!r}") from error

    def to_dict(self) -> dict[str, Any]:
        """As in transformers; several `pins` are pairs, since config.json is sorted and their order counts."""
        output = super().to_dict()
        if len(self.pins) > 1:
            output["pins"] = [list(pin) for pin in self.pins.items()]
        return output

    def decided(self) -> dict[str, Any]:
        """The fields that the weights of a saved model are made with; `from_dict` refuses others as keywords."""
        return {field: getattr(self, field) for field in _DECIDED}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing: the code is in the package, and no copy of it is to be saved with a model."""

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images."""
        size = (self.pretrained_cfg or {}).get("input_size") or (self.model_args.get("in_chans", 3), 224, 224)
        return tuple(size)  # type: ignore[return-value]


_MADE_ANEW = "make a model anew from float weights, with from_timm or from_float."
_BITS_ONLY = f"change bits with model.set_strategy({{layer: bits}}), or {_MADE_ANEW}"
# Fields that a model with a strategy was made with -> what to do instead of changing one as it is loaded.
_DECIDED = {
    "activation_bits": "use model.set_strategy(model.strategy.with_activation_bits({layer: bits})), and calibrate.",
    "first_last_bits": _BITS_ONLY,
    "pins": _BITS_ONLY,
    "weight_quantizer": _MADE_ANEW,
    "weight_grid": _MADE_ANEW,
    "weight_scale": _MADE_ANEW,
    "reparameterize": _MADE_ANEW,
    "scales": "use model.to_hardware_profile(batches).",
}


def check_fields(fields: Iterable[str]) -> None:
    """`ValueError` for the name of a field that no configuration has, with the nearest that it has."""
    config = SDQConfig()
    for name in fields:
        if not hasattr(config, name):
            near = get_close_matches(name, vars(config), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"SDQConfig has no field {short(name)}.{hint} Arguments of timm.create_model, such as in_chans, go into "
                "model_args; the number of classes is num_labels."
            )


def _mapping(pins: Any) -> Any:
    """Pins as a dictionary, where they are pairs as in config.json; what is neither is left to the checks."""
    if pins is None:
        return {}
    pairs = isinstance(pins, list | tuple) and all(
        isinstance(pin, list | tuple) and len(pin) == 2 and isinstance(pin[0], str) for pin in pins
    )
    return dict(pins) if pairs else pins


def _check_bits(field: str, bits: Any, float_allowed: bool = True) -> None:
    valid = _is_whole(bits) and 1 <= bits <= 8
    if not valid and not (float_allowed and _is_whole(bits) and bits == FLOAT_BITS):
        extra = f" (or {FLOAT_BITS} for float)" if float_allowed else ""
        number = isinstance(bits, int) or (isinstance(bits, float) and math.isfinite(bits))
        nearest = f"; the nearest is {round(min(8, max(1, bits)))}" if number else ""
        raise ValueError(f"{field} must be a whole number from 1 to 8{extra}, got {short(bits)}{nearest}.")


def _one_of(field: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = get_close_matches(str(value)[:100], choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{field} must be one of {', '.join(choices)}, got {short(value)}.{hint}")


# What timm's create_model would act on beyond building the network: reading files, downloading, wrapping.
_NOT_FOR_MODEL_ARGS = ("cache_dir", "checkpoint_path", "exportable", "features_only", "no_jit", "scriptable")
# No network has a number of layers, a width or a side of its images above this; larger ones would only exhaust the machine.
_LARGEST_ARGUMENT = 16384
# What timm takes as numbers of blocks; deeper networks than any would take for ever to be made.
_DEPTHS = ("depth", "depths", "layers", "blocks_per_stage", "num_blocks")
_LARGEST_DEPTH = 256
_MOST_PINS = 1000
_LARGEST_SIDE = 4096
_LARGEST_HEAD = 1_000_000
_INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming", "random")
_PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
_DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")


def _check_average_sizes(sizes: Any) -> None:
    if sizes is None:
        return
    if not isinstance(sizes, Mapping) or len(sizes) > _MOST_PINS or not all(isinstance(name, str) for name in sizes):
        raise ValueError(f"average_sizes must map names of poolings to [height, width], got {short(sizes)}.")
    for name, size in sizes.items():
        whole = isinstance(size, list | tuple) and len(size) == 2 and all(map(_is_whole, size))
        if not whole or not all(1 <= n <= _LARGEST_ARGUMENT for n in size):
            raise ValueError(f"average_sizes[{short(name)}] must be [height, width] in pixels, got {short(size)}.")


def _check_architecture(name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"architecture must be a timm model name, got {short(name)}.")
    if not re.fullmatch(r"[\w.-]{1,200}", name):
        raise ValueError(
            f"architecture must be a timm model name, such as 'resnet18', no path or address: {short(name)}."
        )


def _check_model_args(arguments: Any) -> None:
    if not isinstance(arguments, Mapping):
        raise ValueError(f"model_args must map names to values, got {short(arguments)}.")
    if "num_classes" in arguments:
        raise ValueError("model_args must not hold num_classes: set num_labels (or id2label) instead.")
    for name, value in arguments.items():
        if not isinstance(name, str) or name in _NOT_FOR_MODEL_ARGS or name.startswith("pretrained"):
            raise ValueError(f"model_args must not hold {short(name)}: it does not describe the network.")
        _check_plain(f"model_args[{name!r}]", value)
        if name in _DEPTHS and any(_is_number(n) and n > _LARGEST_DEPTH for n in _numbers(value)):
            raise ValueError(f"model_args[{name!r}] must be at most {_LARGEST_DEPTH}, got {short(value)}.")
        if any(isinstance(text, str) and re.search(r"\d{4,}", text) for text in _numbers(value)):
            raise ValueError(
                f"model_args[{name!r}] must not hold numbers of four digits in a text, got {short(value)}."
            )


def _numbers(value: Any) -> list[Any]:
    """The values in nested lists and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return [n for item in value for n in _numbers(item)] if isinstance(value, list | tuple) else [value]


def _check_plain(field: str, value: Any, depth: int = 0) -> None:
    """JSON of a sane size: what config.json can hold, and no number that would ask for terabytes."""
    if value is None or isinstance(value, bool) or (isinstance(value, str) and len(value) <= 200):
        return
    if isinstance(value, int | float):
        if not abs(value) <= _LARGEST_ARGUMENT:
            raise ValueError(f"{field} must be a number of at most {_LARGEST_ARGUMENT}, got {short(value)}.")
        return
    if isinstance(value, list | tuple | Mapping) and len(value) <= 256 and depth < 4:
        for item in value.values() if isinstance(value, Mapping) else value:
            _check_plain(field, item, depth + 1)
        return
    raise ValueError(f"{field} must be a plain value that JSON can hold, got {short(value)}.")


def check_pretrained_cfg(config: Any) -> None:
    """`ValueError` for a field of timm's data configuration that the transforms could not work with."""
    if config is None:
        return
    if not isinstance(config, Mapping):
        raise ValueError(f"pretrained_cfg must map names to values, got {short(config)}.")
    size = config.get("input_size")
    if size is not None and not (
        isinstance(size, list | tuple)
        and len(size) == 3
        and all(_is_whole(n) and 1 <= n <= _LARGEST_ARGUMENT for n in size)
    ):
        raise ValueError(f"pretrained_cfg['input_size'] must be [channels, height, width], got {short(size)}.")
    for field in ("mean", "std"):
        values = config.get(field)
        if values is None:
            continue
        numbers = isinstance(values, list | tuple) and all(_is_number(value) for value in values)
        if not numbers or len(values) != (size or [3])[0] or (field == "std" and 0 in values):
            raise ValueError(
                f"pretrained_cfg[{field!r}] must be one number for each channel"
                f"{', none of them 0' * (field == 'std')}, got {short(values)}."
            )
    for field, known in (("interpolation", _INTERPOLATIONS), ("crop_mode", ("center", "squash", "border"))):
        if config.get(field) is not None:
            _one_of(f"pretrained_cfg[{field!r}]", config[field], known)
    share = config.get("crop_pct")
    if share is not None and not (_is_number(share) and 0.05 <= share <= 2):
        raise ValueError(f"pretrained_cfg['crop_pct'] must be from 0.05 to 2, got {short(share)}.")
    side = max(size[1:]) / min(1.0, share or 1.0) if size is not None else 0
    if side > _LARGEST_SIDE:
        raise ValueError(
            f"pretrained_cfg: images would be resized to {side:.0f} pixels, at most {_LARGEST_SIDE} are supported, "
            f"with input_size {short(size)} and crop_pct {share}."
        )


def _check_labels(kwargs: Mapping[str, Any]) -> None:
    count, names, numbers = (kwargs.get(key) for key in ("num_labels", "id2label", "label2id"))
    if count is not None and not (_is_whole(count) and 0 <= count <= _LARGEST_HEAD):
        raise ValueError(f"num_labels must be a whole number from 0 to {_LARGEST_HEAD}, got {short(count)}.")
    for field, value in (("id2label", names), ("label2id", numbers)):
        if value is not None and not (isinstance(value, Mapping) and len(value) <= _LARGEST_HEAD):
            raise ValueError(f"{field} must map classes to names or names to classes, got {short(value)}.")
    if names is not None:
        keys = {str(key) for key in names}
        if keys != {str(i) for i in range(len(names))}:
            raise ValueError(f"id2label must have the keys 0 to {len(names) - 1}, got {short(sorted(keys))}.")
        if not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"id2label must map to names, got {short(list(names.values()))}.")


def _check_common(kwargs: Mapping[str, Any]) -> None:
    """Fields of every transformers configuration that are acted upon without a look at their type."""
    for field in ("dtype", "torch_dtype"):
        value = kwargs.get(field)
        known = value is None or isinstance(value, torch.dtype) or (isinstance(value, str) and value in _DTYPES)
        if not known:
            raise ValueError(f"{field} must be one of {', '.join(_DTYPES)}, got {short(value)}.")
    # The last three can make transformers load code for attention from the Hub.
    refused = ("transformers_weights", "fusion_config", "attn_implementation", "_attn_implementation")
    for field in (*refused, "experts_implementation"):
        if kwargs.get(field) is not None:
            raise ValueError(f"{field} has no place in the configuration of a quantized timm model.")
    if kwargs.get("problem_type") is not None:
        _one_of("problem_type", kwargs["problem_type"], _PROBLEMS)
    texts: dict[str, Any] = {field: kwargs.get(field) for field in ("transformers_version", "model_type")}
    names, places = kwargs.get("architectures"), kwargs.get("auto_map")
    for field, value in texts.items():
        if not isinstance(value, str | None):
            raise ValueError(f"{field} must be a text, got {short(value)}.")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"architectures must be a list of class names, got {short(names)}.")
    if places is not None and not (
        isinstance(places, Mapping) and all(isinstance(place, str) for place in places.values())
    ):
        raise ValueError(f"auto_map must map Auto classes to classes, got {short(places)}.")


def _check_method(config: Any) -> None:
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", "sdq")
    if config is not None and method != "sdq":
        raise ValueError(f"quantization_config: quant_method must be 'sdq', got {short(method)}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
