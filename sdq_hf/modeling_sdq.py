"""SDQForImageClassification: a timm image classifier whose layers have learned bitwidths."""

import copy
import os
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import timm
import torch
from accelerate.utils import extract_model_from_parallel
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from .backbones import create_backbone, hub_id, normalisation, pretrained_labels, set_grad_checkpointing, sized
from .checkpoint import DIGEST
from .configuration_sdq import SDQConfig, check_fields
from .configured import (
    configured_backbone,
    configured_state,
    fitting_average_sizes,
    fitting_strategy,
    initial_strategy,
    timm_backbone,
)
from .hf_quantizer import SDQHfQuantizer, SDQQuantizationConfig
from .layers import (
    QuantizedLayer,
    apply_strategy,
    attach,
    attached_layers,
    input_quantizers,
    is_quantizer_state,
    modes_restored,
    quantizable_layers,
    quantized_layers,
    quantizer_parameters,
)
from .packed_files import PackedFilesMixin, allows_new_layers
from .strategy import FLOAT_BITS, Strategy

# Images [B, C, H, W], alone, in a pair with labels, or in a dict as pixel_values.
Batch = Tensor | Sequence[Any] | Mapping[str, Tensor]
# Several of them, or one tensor or dict.
Batches = Iterable[Batch] | Tensor | Mapping[str, Tensor]


class SDQForImageClassification(PackedFilesMixin):
    """A timm classifier with a weight and an input quantizer on each conv and linear layer.

    `model.timm_model` is timm's own module tree. `model.strategy` tells the bits, `model.set_strategy` changes them. A
    `state_dict()` does not hold them: load one into a model of the same strategy, or use `save_pretrained`.
    """

    config_class = SDQConfig
    config: SDQConfig
    base_model_prefix = "timm_model"
    main_input_name = "pixel_values"
    model_tags = ["sdq"]
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    # Integers times a scale stay what they are at any precision of the rest.
    _keep_in_fp32_modules_strict = ["weight_quantizer", "input_quantizer"]
    _keys_to_ignore_on_load_unexpected = [DIGEST]

    def __init__(self, config: SDQConfig):
        super().__init__(config)
        self.timm_model = configured_backbone(config)
        config.average_sizes = fitting_average_sizes(config, self.timm_model)
        # Layers that a loaded file cannot fill, since the number of classes was changed: names as in `named_modules()`.
        self.new_layers: list[str] = []
        if config.strategy is None:
            strategy = initial_strategy(config, self.timm_model)
        else:
            strategy, new = fitting_strategy(config, self.timm_model)
            self.new_layers = [f"{self.base_model_prefix}.{name}" for name in new]
        if self.new_layers and allows_new_layers.get() is False:
            raise ValueError(
                f"The head {self.new_layers[0]!r} of the file is not for the {config.num_labels} classes asked for. "
                "With ignore_mismatched_sizes=True it is made anew, to be trained."
            )
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
        id2label: Mapping[int, str] | Sequence[str] | None = None,
        model_args: Mapping[str, Any] | None = None,
        img_size: int | None = None,
        pretrained_path: str | os.PathLike | None = None,
        **config_kwargs: Any,
    ) -> "SDQForImageClassification":
        """A quantized model from a timm model and its float weights.

        Args:
            architecture: timm name, ours (`resnet20_cifar`) included.
            num_labels: size of the head; default: that of the timm model.
            pretrained: load timm's pretrained weights. checkpoint_path: load float weights from a file, as in timm.
            id2label: label names, by number or as a list; sets num_labels. `label2id` does as well. Default: ImageNet's, with
                pretrained weights that have them.
            model_args: further arguments of `timm.create_model`, e.g. `{"in_chans": 1}`.
            img_size: side of the square images in pixels; default: the model's own, or that of `model_args`. Networks that
                are made for one size, as transformers, are made for this one.
            pretrained_path: a file to take the place of timm's pretrained weights; the head is new, of `num_labels`.
            config_kwargs: fields of `SDQConfig`; of `pretrained_cfg` what differs from timm's description of the images, such
                as `{"mean": [0.5], "std": [0.5]}` that the weights of `checkpoint_path` were trained with.

        Raises `ValueError` for an unknown model, with near names, and for weights of another network.
        """
        names = _label_names(id2label, config_kwargs.get("label2id"))
        if names is not None:
            num_labels = len(names)
        head = {} if num_labels is None else {"num_classes": num_labels}
        model_args = sized(architecture, model_args or {}, img_size)
        source = create_backbone(
            architecture,
            pretrained=pretrained,
            checkpoint_path=os.fspath(checkpoint_path or ""),
            pretrained_path=pretrained_path,
            **head,
            **model_args,
        )
        if pretrained and not pretrained_path:
            config_kwargs.setdefault("base_model", hub_id(source))
            names = names if names is not None else pretrained_labels(source)
        return cls.from_float(
            source, architecture, id2label=names, model_args=model_args, img_size=img_size, **config_kwargs
        )

    @classmethod
    def from_float(
        cls,
        source: nn.Module,
        architecture: str,
        id2label: Mapping[int, str] | Sequence[str] | None = None,
        model_args: Mapping[str, Any] | None = None,
        img_size: int | None = None,
        **config_kwargs: Any,
    ) -> "SDQForImageClassification":
        """A quantized model with the weights of `source`, a float timm model called `architecture`.

        `model_args`: what it was created with, as in `from_timm`. Among `config_kwargs` may be `pretrained_cfg`, with timm's
        description of the images where it differs from the architecture's: `{"mean": [0.5], "std": [0.5]}`.

        Raises `ValueError` for weights of another network.
        """
        # A network inside a wrapper for several devices, or compiled.
        source = extract_model_from_parallel(source, keep_torch_compile=False)
        own = config_kwargs.pop("pretrained_cfg", None) or {}
        for field in own:
            if field not in PretrainedCfg.__dataclass_fields__:
                raise ValueError(
                    f"pretrained_cfg has no field {field!r}, which timm knows: mean, std, interpolation, ..."
                )
        pretrained_cfg = dict(getattr(source, "pretrained_cfg", None) or {})
        data = timm.data.resolve_data_config(pretrained_cfg=pretrained_cfg, model=source)
        channels = (model_args or {}).get("in_chans", data["input_size"][0])
        side = img_size or (model_args or {}).get("img_size") or data["input_size"][1:]
        size = (side, side) if isinstance(side, int) else tuple(side)
        pretrained_cfg.update(data, input_size=(channels, *size), num_classes=getattr(source, "num_classes", 0))
        pretrained_cfg["mean"], pretrained_cfg["std"] = normalisation(source, channels)
        pretrained_cfg.update(own)
        names = _label_names(id2label, config_kwargs.pop("label2id", None))
        count = config_kwargs.pop("num_labels", getattr(source, "num_classes", 0))
        labels = (
            {"id2label": names, "label2id": {name: number for number, name in names.items()}}
            if names is not None
            else {"num_labels": count}
        )
        check_fields(config_kwargs)
        config = SDQConfig(
            architecture=architecture,
            model_args=dict(model_args or {}),
            pretrained_cfg=_plain(pretrained_cfg),
            **labels,
            **config_kwargs,
        )
        model = cls(config)
        try:
            model._take_weights(configured_state(config, source))
        except (KeyError, RuntimeError) as error:
            reason = textwrap.shorten(str(error.args[0]), 300)
            raise ValueError(
                f"The weights of source are not those of {architecture!r} with {config.num_labels} classes and "
                f"model_args={dict(model_args or {})}, the arguments that it is created with: {reason}"
            ) from error
        return model

    def _attach(self, strategy: Strategy) -> None:
        for name, module in quantizable_layers(self.timm_model).items():
            if not strategy[name].is_float:
                config = self.config
                attach(
                    module,
                    name,
                    strategy[name],
                    config.weight_quantizer,
                    config.weight_grid,
                    per_channel=config.weight_scale == "channel",
                    power_of_two=config.scales == "power_of_two",
                )

    # Bits --------------------------------------------------------------------------------------------------------

    @property
    def strategy(self) -> Strategy:
        """Bits of every layer; a value, read from the configuration."""
        return Strategy.from_json(self.config.strategy or [])

    def set_strategy(self, strategy: Strategy | int | Mapping[str, int]) -> None:
        """Change bits: a `Strategy`, one number of weight bits for every searchable layer, or layer name -> weight bits.

        Of a `Strategy` only the bits of weights and inputs are taken; sizes and pins stay the model's own. A layer whose bits
        change gets a scale fitted to its weights; the others keep theirs. Raises `KeyError` for layers that are not the
        network's, `ValueError` for bits that are not possible and for a model that is dequantized; nothing is changed then.
        """
        if not self.quantized_layers():
            raise ValueError(
                "The model is dequantized, it has no bits to change: set them before dequantize(), or load it again."
            )
        current = self.strategy
        if not isinstance(strategy, Strategy):
            strategy = current.with_bits(strategy)
        for name in current:
            if name not in strategy:
                raise KeyError(f"The strategy lacks the layer {name!r} of the network.")
        changed = dict(current)
        for name, layer in strategy.items():
            own, bits = current[name], layer.weight_bits
            if (bits == FLOAT_BITS) != (own.weight_bits == FLOAT_BITS):
                raise ValueError(f"Layer {name!r}: whether a layer is float is decided at creation, by `pins`.")
            if (layer.activation_bits == FLOAT_BITS) != (own.activation_bits == FLOAT_BITS):
                raise ValueError(
                    f"Layer {name!r}: whether its inputs are float is decided at creation, by `activation_bits`, "
                    "`first_last_bits` and `pins`."
                )
            if isinstance(bits, tuple) != isinstance(own.weight_bits, tuple):
                raise ValueError(
                    f"Layer {name!r}: bits for each output channel are for a model of granularity 'kernel', this one is of "
                    f"{self.config.granularity!r}."
                )
            if layer.num_weights != own.num_weights:
                raise ValueError(
                    f"Layer {name!r} has {own.num_weights} weights, {layer.num_weights} in the strategy: that is "
                    "one of another network."
                )
            if isinstance(bits, tuple) and isinstance(own.weight_bits, tuple) and len(bits) != len(own.weight_bits):
                raise ValueError(
                    f"Layer {name!r} has {len(own.weight_bits)} output channels, the strategy {len(bits)}."
                )
            changed[name] = replace(own, weight_bits=bits, activation_bits=layer.activation_bits)
        apply_strategy(self.timm_model, Strategy.of(changed))
        self.config.strategy = Strategy.of(changed).to_json()

    @torch.no_grad()
    def load_float_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a float timm model (its `state_dict`), fit every scale to them, and forget the steps."""
        with torch.device("meta"):
            network = timm_backbone(self.config)
        _check_names(state, network.state_dict())
        network.load_state_dict(state, assign=True)
        self._take_weights(configured_state(self.config, network))

    @torch.no_grad()
    def _take_weights(self, state: Mapping[str, Tensor]) -> None:
        own = self.timm_model.state_dict()
        _check_names(state, [key for key in own if not is_quantizer_state(key)])
        self.timm_model.load_state_dict({**own, **state})
        for layer in self.quantized_layers().values():
            layer.weight_quantizer.fit_scale(layer.weight)
        self._forget_steps()

    def float_twin(self) -> nn.Module:
        """The float timm model, in the form for quantizers (`configured_backbone`), with this model's real weights.

        A copy in eval mode.
        """
        twin = configured_backbone(self.config)
        own, wanted = self.timm_model.state_dict(), twin.state_dict()
        twin.load_state_dict({key: own[key] for key in wanted})
        return twin.to(self.device).eval()

    @contextmanager
    def float_mode(self) -> Iterator[None]:
        """Inside, the model computes in float: no quantizer works."""
        before = [(layer, layer.enabled) for layer in attached_layers(self.timm_model).values()]
        try:
            for layer, _ in before:
                layer.enabled = False
            yield
        finally:
            for layer, enabled in before:
                layer.enabled = enabled

    def quantized_layers(self) -> dict[str, QuantizedLayer]:
        """Name (as in `strategy`) -> layer, of every layer whose weights are quantized."""
        return quantized_layers(self.timm_model)

    def is_calibrated(self) -> bool:
        """Whether every activation step has been fitted or loaded."""
        return all(quantizer.step.item() > 0 for quantizer in input_quantizers(self.timm_model).values())

    # Calibration -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, batches: Batches, num_batches: int = 4) -> None:
        """Fit every activation step and sign to the images of `batches`, or of one batch.

        Each is [B, C, H, W], alone, in a pair with labels, or in a dict as pixel_values; a single one is a tensor or dict.

        Layer by layer in the network's order, each seeing the quantized outputs of those before it. Raises `ValueError` for
        data without a batch, or with one that is no images, and inside `float_mode`, where no input is quantized; on any
        error the steps stay as they were.
        """
        self._check_enabled("calibrate")
        images = torch.cat(list(_first(batches, num_batches))).to(self.device)
        if images.dim() != 4:
            raise ValueError(f"Images to calibrate with must be [B, C, H, W], got {images.dim()} dimensions.")
        if not images.numel():
            raise ValueError(f"Images to calibrate with are needed, got a tensor of shape {list(images.shape)}.")
        if not images.isfinite().all():
            raise ValueError("Images to calibrate with must be finite: some have NaN or infinite values.")
        quantizers = input_quantizers(self.timm_model).values()
        with _restored_on_error(self), modes_restored(self):
            self._forget_steps()
            try:
                for quantizer in quantizers:
                    quantizer.calibrating = True
                self.eval()(images)
            finally:
                for quantizer in quantizers:
                    quantizer.calibrating = False

    def to_hardware_profile(
        self,
        batches: Batches,
        num_batches: int = 4,
        weight_scale: str | None = None,
    ) -> "SDQForImageClassification":
        """A copy in the form that integer hardware computes in, with the same strategy: `scales="power_of_two"`.

        Batch norm is folded, the units of weights and inputs become powers of two, biases whole numbers, all fitted to this
        model's real weights and to `batches` as in `calibrate`. That changes the outputs; a short fine-tune brings most of
        it back (`scripts/to_hardware.py`).

        Args:
            weight_scale: as in `SDQConfig`; default: one for each output channel where the quantizer can, since what
                batch norm did to each channel is in its weights now.

        Raises `ValueError` that names the module for a network that cannot be put so, and for layers that are float.
        """
        if self.config.scales == "power_of_two":
            raise ValueError("The model is in the hardware profile already: its scales are powers of two.")
        for name, layer in self.strategy.items():
            # One that is never called has no part in the outputs.
            if FLOAT_BITS in (layer.weight_bits, layer.activation_bits) and layer.macs:
                what = "weights are" if layer.weight_bits == FLOAT_BITS else "inputs are"
                raise ValueError(
                    f"Layer {name!r}: its {what} float, and integer hardware needs 1 to 8 bits for both. Give it bits in "
                    "pins, activation_bits and first_last_bits, and start from the model before dequantize()."
                )
        if weight_scale is None:
            weight_scale = "channel" if self.config.weight_quantizer == "lsq" else "layer"
        fields = self.config.to_dict()
        # Of the model that this one is made from; the new one's own class sets them.
        for field in ("quantization_config", "auto_map", "architectures"):
            fields.pop(field, None)
        config = SDQConfig.from_dict({**fields, "scales": "power_of_two", "weight_scale": weight_scale})
        profile = type(self)(config).to(self.device)
        profile._take_weights(configured_state(config, self.float_twin()))
        profile.calibrate(batches, num_batches)
        return profile.train(self.training)

    def _check_enabled(self, call: str) -> None:
        if not all(layer.enabled for layer in attached_layers(self.timm_model).values()):
            raise ValueError(
                f"{call}() depends on the quantizers, which float_mode() has put out of work: call it outside."
            )

    def _forget_steps(self) -> None:
        for quantizer in input_quantizers(self.timm_model).values():
            quantizer.set_bits(quantizer.bits)

    @torch.no_grad()
    def recalibrate_batch_norm(self, batches: Batches, num_batches: int = 50) -> None:
        """Gather batch-norm statistics anew under the present bits (METHOD 6.3); nothing else changes.

        They are means over the batches, of what comes by in eval mode: without dropout. `batches` and errors as in
        `calibrate`.
        """
        norms = [module for module in self.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
        if not norms:
            return
        momenta = [norm.momentum for norm in norms]
        with _restored_on_error(self), modes_restored(self):
            self.eval()
            for norm in norms:
                norm.reset_running_stats()
                # The mean of all batches, not one that forgets the first.
                norm.momentum = None
                # Not train(), which would take timm's DropBlock inside it along.
                norm.training = True
            for images in _first(batches, num_batches):
                self(images.to(self.device))
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum

    # Forward -----------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """`pixel_values` [B, C, H, W] -> logits [B, num_labels], and with `labels` the loss, as in transformers.

        That is of `config.problem_type`, and where it is None of the labels: int64 [B] for cross-entropy, float
        [B, num_labels] for binary cross-entropy of each label, [B] for the squared error of one number (`num_labels=1`).

        Raises `ValueError` where hidden states or attentions are asked for: a timm model does not give them here.
        """
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        for field, value in asked.items():
            if getattr(self.config, field) if value is None else value:
                raise ValueError(f"{field} is not possible: the model gives only logits.")
        logits = self.timm_model(pixel_values)
        # A copy, since transformers writes into it which problem it has found.
        loss = None if labels is None else self.loss_function(labels, logits, copy.copy(self.config))
        return ImageClassifierOutput(loss=loss, logits=logits)

    def _init_weights(self, module: nn.Module) -> None:
        # timm has initialised its modules, or every weight comes from a file: but for a new head's.
        if allows_new_layers.get() and isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], *args: Any) -> None:
        # That of a packed file, if Trainer loads one; `from_pretrained` has compared it.
        state_dict.pop(DIGEST, None)
        super()._load_from_state_dict(state_dict, *args)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        # What transformers' Trainer calls; how is timm's choice.
        set_grad_checkpointing(self.timm_model, enable)

    # Types -------------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """That of the computation; scales and steps are float32 always, and so are weights that all normalise together."""
        own = {id(parameter) for _, parameter in quantizer_parameters(self)}
        weights = {id(layer.weight) for layer in self.quantized_layers().values()}
        floats = [p for p in self.parameters() if p.is_floating_point() and id(p) not in own]
        return next((p for p in floats if id(p) not in weights), floats[0]).dtype

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

        Raises `ValueError` for a model with integer biases, which are multiples of activation steps, before these are fitted,
        and inside `float_mode`.
        """
        if not self.quantized_layers():
            return self
        self._check_enabled("dequantize")
        for name, layer in self.quantized_layers().items():
            if layer.integer_bias and layer.input_quantizer is not None and layer.input_quantizer.step.item() <= 0:
                raise ValueError(
                    f"Layer {name!r}: its activation step was never fitted, and its bias is a multiple of it. Call "
                    "model.calibrate(images) before dequantize()."
                )
        super().dequantize(dtype=dtype)
        # Nothing is left for a search.
        strategy = {name: replace(layer, weight_bits=FLOAT_BITS, pinned=True) for name, layer in self.strategy.items()}
        self.config.strategy = Strategy.of(strategy).to_json()
        return self if dtype is None else self.to(dtype)


def _label_names(id2label: Any, label2id: Mapping[str, int] | None) -> dict[int, str] | None:
    """Number -> name of each class, from either of transformers' maps, or a list of names; None without."""
    if id2label is None and label2id is None:
        return None
    if id2label is None:
        return {int(number): name for name, number in (label2id or {}).items()}
    pairs = id2label.items() if isinstance(id2label, Mapping) else enumerate(id2label)
    return {int(number): name for number, name in pairs}


def _check_names(state: Mapping[str, Tensor], expected: Collection[str]) -> None:
    """`KeyError` where the tensors of `state` are not those that are expected."""
    missing, unexpected = set(expected) - state.keys(), state.keys() - set(expected)
    if missing or unexpected:
        raise KeyError(f"Float weights do not fit: missing {sorted(missing)[:3]}, unexpected {sorted(unexpected)[:3]}.")


def pixels_of(batch: Batch) -> Tensor:
    """The images [B, C, H, W] of a batch; `ValueError` for one that has none."""
    images: Any = batch.get("pixel_values") if isinstance(batch, Mapping) else batch
    if isinstance(batch, tuple | list) and batch:
        # Images and labels, as timm's and torchvision's loaders give them.
        images = batch[0]
    if not isinstance(images, Tensor):
        got = f"a mapping with {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            "A batch must be a tensor [B, C, H, W], a pair of one and labels, or a mapping with one as 'pixel_values'; "
            f"got {got}."
        )
    return images


def _first(batches: Batches, num_batches: int) -> Iterator[Tensor]:
    """The images of each of the first `num_batches`, or of the one that `batches` is; `ValueError` where there is none."""
    if num_batches < 1:
        raise ValueError(f"num_batches must be at least 1, got {num_batches}.")
    if isinstance(batches, Tensor | Mapping):
        # One batch, which would be taken apart into its images or its names.
        batches = [batches]
    batch = None
    for batch in islice(batches, num_batches):
        yield pixels_of(batch)
    if batch is None:
        raise ValueError(
            "The data has no batch: is the split empty, smaller than one batch, or an iterator that is used up?"
        )


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """After an exception inside, activation steps and batch-norm statistics are as before."""
    norms = [(module, module.momentum) for module in model.modules() if isinstance(module, _BatchNorm)]
    quantizers = input_quantizers(model).values()
    ranges = [(quantizer, quantizer._range, quantizer._least) for quantizer in quantizers]
    tensors = [tensor for norm, _ in norms for tensor in norm.buffers()]
    tensors += [tensor for quantizer in quantizers for tensor in (quantizer.step.data, quantizer.signed)]
    copies = [tensor.clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        for norm, momentum in norms:
            norm.momentum = momentum
        for tensor, copied in zip(tensors, copies, strict=True):
            tensor.copy_(copied)
        for quantizer, range_, least in ranges:
            quantizer._range, quantizer._least = range_, least
        raise


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that JSON gives back as it was: tuples become lists, empty fields are left out."""
    data = copy.deepcopy(dict(data))
    return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items() if v is not None}
