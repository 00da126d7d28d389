"""Loading, saving and publishing a model: transformers' own ways, with packed weights and their checks."""

import os
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import torch
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d
from transformers import PreTrainedModel

from .checkpoint import CheckpointError, check_index, check_inputs, check_scale
from .configuration_sdq import SDQConfig
from .configured import configured_backbone
from .hf_quantizer import given_state
from .layers import input_quantizers, is_quantizer_state, quantizable_layers, quantized_layers
from .strategy import FLOAT_BITS, Strategy, bits_text

# The file that lets transformers find the classes with trust_remote_code=True, without `import sdq_hf`.
REMOTE_CODE = "sdq_remote.py"
_REMOTE_SOURCE = """# The classes of the installed package sdq_hf, for `trust_remote_code=True`.
from sdq_hf import SDQConfig, SDQForImageClassification, SDQImageProcessor
"""
_HUB_OPTIONS = ("repo_id", "private", "token", "revision", "commit_message", "commit_description", "create_pr")
# Of `from_pretrained`: where files come from.
_FILE_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_AUTO_MAP = {
    "AutoConfig": "sdq_remote.SDQConfig",
    "AutoImageProcessor": "sdq_remote.SDQImageProcessor",
    "AutoModelForImageClassification": "sdq_remote.SDQForImageClassification",
}

# Inside `from_pretrained`: whether its caller allows layers of other shapes than the file's.
allows_new_layers: ContextVar[bool | None] = ContextVar("allows_new_layers", default=None)


class PackedFilesMixin(PreTrainedModel):
    """The part of `SDQForImageClassification` that deals with files and the Hub."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *model_args: Any, **kwargs: Any) -> Any:
        """As in transformers, from a folder or a Hub id. The file is looked over first (`sdq_hf.checkpoint`).

        With other `num_labels` and `ignore_mismatched_sizes=True` the head is made anew. With `dtype` the network computes in
        that type, and scales stay float32.

        Raises `ValueError` naming the field or the tensor for a configuration or a file that is damaged or does not fit.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)
        token = allows_new_layers.set(bool(kwargs.get("ignore_mismatched_sizes", False)))
        try:
            if os.path.isdir(pretrained_model_name_or_path):
                check_index(os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder", "")))
            config = kwargs.get("config")
            if isinstance(config, SDQConfig) and config.strategy is not None:
                # The file's own configuration refuses what this one has otherwise. transformers' loader takes the commit from
                # it too, and so asks the Hub once.
                files = {key: kwargs[key] for key in _FILE_OPTIONS if key in kwargs}
                files["_commit_hash"] = getattr(config, "_commit_hash", None)
                SDQConfig.from_pretrained(pretrained_model_name_or_path, **files, **config.decided())
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError) as error:
            # What a wrong value of one of the many fields that transformers has may end in.
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: config.json, or an argument, has a value that transformers does not "
                f"understand: {error!r}"
            ) from error
        finally:
            allows_new_layers.reset(token)
        new = tuple(f"{name}." for name in model.new_layers)
        # A file of a quantized model was compared with its configuration already; one of float weights was not.
        missing = [name for name in sorted(info["missing_keys"]) if not name.startswith(new)]
        if missing:
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: the file lacks {missing[0]!r}, which config.json asks for."
            )
        # Ranges and floors are read from the state now: in a graph of torch.export or torch.compile they could not be.
        for name, inputs in input_quantizers(model.timm_model).items():
            check_inputs(name, inputs)
            _ = inputs.range
            inputs.keep_positive(inputs.step)
        for layer in model.quantized_layers().values():
            layer.weight_quantizer.keep_positive(layer.weight_quantizer.scale)
        _restore_buffers(model)
        _align(model)
        return (model, info) if wants_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        *,
        print_size: bool = True,
        remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save for use: weights packed at their bits, config.json with the strategy. Prints the size (`size_report`).

        `is_main_process`: only there something is written. `state_dict`: tensors to be saved in place of the model's own,
        as of a moving average; with the names of `model.state_dict()`, else `ValueError`.

        With `remote_code` the folder can be loaded with `trust_remote_code=True` in place of `import sdq_hf`; the package
        must be installed all the same. `push_to_hub`, and `repo_id` and further options with it, as in transformers.

        Activation steps must be fitted (`calibrate`, or any forward pass), and the layers those of the strategy, else
        `ValueError` names the layer.
        """
        _check_layers(self.strategy, self.timm_model)
        for layer in self.quantized_layers().values():
            layer.weight_quantizer.keep_positive(layer.weight_quantizer.scale)
        state = _named_alike(state_dict, self)
        for name, quantizer in input_quantizers(self.timm_model).items():
            quantizer.keep_positive(quantizer.step)
            if state is None and quantizer.step.item() <= 0:
                raise ValueError(
                    f"Layer {name!r}: its activation step was never fitted. Call model.calibrate(images) before saving."
                )
        hub_options = {key: kwargs.pop(key) for key in _HUB_OPTIONS if key in kwargs}
        remote = Path(save_directory) / REMOTE_CODE
        # A loaded configuration may have a map whose file is elsewhere.
        self.config.__dict__.pop("auto_map", None)
        if remote_code:
            self.config.auto_map = dict(_AUTO_MAP)
        state = _with_counters(state, self)
        token = given_state.set(state)
        try:
            super().save_pretrained(save_directory, is_main_process, state, **kwargs)
        finally:
            given_state.reset(token)
        if not is_main_process:
            return
        _remove_older(Path(save_directory))
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
                one that is written; `license` and further `tags` of the card; `remote_code` as in `save_pretrained`.

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
        size = weight_file_bytes(folder)
        float_bytes = self.float_bytes()
        return (
            f"Saved {folder}: {size / 1e3:,.1f} kB packed ({self.strategy.average_bits():.2f} average bits), "
            f"{float_bytes / size:.1f}x smaller than {float_bytes / 1e3:,.1f} kB in float32."
        )

    def float_bytes(self) -> int:
        """What the tensors of the same network take in float32, without quantizers."""
        state = self.timm_model.state_dict()
        return sum(
            t.numel() * (4 if t.is_floating_point() else t.element_size())
            for name, t in state.items()
            if not is_quantizer_state(name)
        )

    def ideal_bytes(self) -> int:
        """sum N_l b_l / 8 and 4 bytes for every number that stays float (invariant 3)."""
        packed = {f"{name}.weight" for name in quantized_layers(self.timm_model)}
        rest = sum(t.numel() * t.element_size() for k, t in self.timm_model.state_dict().items() if k not in packed)
        quantized = [x for x in self.strategy.values() if x.weight_bits != FLOAT_BITS]
        return rest + sum(x.total_bits for x in quantized) // 8


def _named_alike(state: Mapping[str, Tensor] | None, model: nn.Module) -> dict[str, Tensor] | None:
    """`state`, if its tensors are those that `model` has, with scales that a file can hold; `ValueError` names the first."""
    if state is None:
        return None
    own = model.state_dict()
    for name in sorted(own.keys() ^ state.keys()):
        raise ValueError(f"state_dict {'lacks' if name in own else 'has'} {name!r}, unlike model.state_dict().")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"state_dict: {name!r} has the shape {list(state[name].shape)}, expected {list(tensor.shape)}."
            )
        if name.endswith((".weight_quantizer.scale", ".input_quantizer.step")):
            layer, _, field = name.rpartition(".")
            check_scale(layer.rpartition(".")[0], state[name], field)
    return dict(state)


def _with_counters(state: dict[str, Tensor] | None, model: nn.Module) -> dict[str, Tensor] | None:
    """`state`, or the model's own, with counters for frozen norms, which have none and whose counterparts in a file do."""
    counters = {
        f"{name}.num_batches_tracked": torch.tensor(0)
        for name, module in model.named_modules()
        if isinstance(module, FrozenBatchNorm2d | FrozenBatchNormAct2d)
    }
    return {**(model.state_dict() if state is None else state), **counters} if counters else state


def _check_layers(strategy: Strategy, network: nn.Module) -> None:
    """`ValueError` that names the first layer of `network` that is not as in `strategy`: its file could not be loaded."""
    layers, quantized, inputs = quantizable_layers(network), quantized_layers(network), input_quantizers(network)
    for name in dict.fromkeys((*strategy, *layers)):
        found: tuple[Any, ...] = ()
        if name in layers:
            bits = quantized[name].weight_quantizer.bits if name in quantized else FLOAT_BITS
            found = cast(Tensor, layers[name].weight).numel(), bits, inputs[name].bits if name in inputs else FLOAT_BITS
            if "weight" not in layers[name]._parameters:
                raise ValueError(
                    f"Layer {name!r}: its weight is computed from other tensors, by torch's prune or a parametrization, "
                    "and a file holds the weight alone. Make it permanent first: torch.nn.utils.prune.remove(layer, "
                    "'weight'), or parametrize.remove_parametrizations(layer, 'weight')."
                )
        layer = strategy.get(name)
        wanted = () if layer is None else (layer.num_weights, layer.weight_bits, layer.activation_bits)
        if found != wanted:
            raise ValueError(
                f"Layer {name!r} is not the strategy's, and a file of the model could not be loaded: the network has "
                f"{_layer_text(*found)}, the strategy {_layer_text(*wanted)}. Bits are changed with set_strategy. For "
                "another number of classes, from_pretrained(..., num_labels=5, ignore_mismatched_sizes=True) makes a new "
                "quantized head."
            )


def _layer_text(weights: int | None = None, bits: Any = None, input_bits: int = FLOAT_BITS) -> str:
    return f"{weights} weights (bits {bits_text(bits)}, inputs {bits_text(input_bits)})" if weights else "no such layer"


def _remove_older(folder: Path) -> None:
    """Of a whole file and the index of a sharded one remove what an earlier model left: the file would be loaded first."""
    both = [folder / "model.safetensors", folder / "model.safetensors.index.json"]
    if all(path.exists() for path in both):
        min(both, key=lambda path: path.stat().st_mtime_ns).unlink()


def weight_file_bytes(folder: str | os.PathLike) -> int:
    """Bytes of the weight files of the model saved in `folder`, shards included."""
    return sum(path.stat().st_size for path in Path(folder).glob("model*.safetensors"))


@torch.no_grad()
def _restore_buffers(model: Any) -> None:
    """Fill the buffers that no file holds (tables of positions and the like): made on the meta device, they hold nothing."""
    network = model.timm_model
    kept = network.state_dict().keys()
    empty = {name: buffer for name, buffer in network.named_buffers() if name not in kept}
    if empty:
        made = dict(configured_backbone(model.config).named_buffers())
        for name, buffer in empty.items():
            buffer.copy_(made[name])


def _align(model: Any) -> None:
    """Copy tensors that are views of the file to where torch puts its own: elsewhere CPU kernels may round otherwise."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
