"""SDQConfig: a timm backbone, its quantizers and its strategy."""

import fnmatch
from difflib import get_close_matches
from typing import Any

from transformers import PretrainedConfig

from .quantizers.grids import GRIDS
from .quantizers.weight import FORMS
from .strategy import FLOAT_BITS, Strategy

GRANULARITIES = ("layer",)


class SDQConfig(PretrainedConfig):
    r"""
    Configuration of `SDQForImageClassification`. Every field is validated on creation; a `ValueError` names the field.

    Args:
        architecture (`str`): timm name of the backbone, `resnet18` or `hf_hub`-free names of ours like `resnet20_cifar`.
        model_args (`dict`, *optional*): further arguments of `timm.create_model`, e.g. `{"in_chans": 1}`.
        num_labels, id2label, label2id: as in every transformers configuration.
        pretrained_cfg (`dict`, *optional*): timm's data configuration (`input_size`, `mean`, `std`, ...); the image
            processor reads it, and BitOPs are counted at its `input_size`.
        candidates (`list[int]`): bitwidths a searchable layer can have, each 1 to 8, gaps allowed (`[2, 4, 8]`).
        granularity (`str`): what shares one bitwidth; "layer".
        weight_quantizer (`str`): "lsq", "dorefa" (the paper's form) or "entropy".
        weight_grid (`str`): "midrise" or "twos_complement".
        activation_bits (`int`): bits of the inputs of all layers between the first and the last, 1 to 8, or 32 for float.
        first_last_bits (`int`): bits of weights and inputs of the first and last layer, 1 to 8, or 32 for float. Those
            layers are pinned (our interpretation of the paper).
        pins (`dict[str, int]`, *optional*): pattern of layer names (as in `fnmatch`) -> weight bits that the search
            leaves alone, 1 to 8, or 32 for a layer that stays float. The last pattern that matches decides.
        strategy (`list`, *optional*): `Strategy.to_json()`, the one truth about bits. None: top of the ladder.
    """

    model_type = "sdq"

    def __init__(
        self,
        architecture: str = "resnet18",
        model_args: dict[str, Any] | None = None,
        pretrained_cfg: dict[str, Any] | None = None,
        candidates: list[int] | tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8),
        granularity: str = "layer",
        weight_quantizer: str = "lsq",
        weight_grid: str = "midrise",
        activation_bits: int = 4,
        first_last_bits: int = 8,
        pins: dict[str, int] | None = None,
        strategy: list[dict[str, Any]] | Strategy | None = None,
        **kwargs,
    ):
        self.architecture = architecture
        self.model_args = dict(model_args or {})
        self.pretrained_cfg = pretrained_cfg
        self.candidates = sorted(candidates) if isinstance(candidates, list | tuple | set) else candidates
        self.granularity = granularity
        self.weight_quantizer = weight_quantizer
        self.weight_grid = weight_grid
        self.activation_bits = activation_bits
        self.first_last_bits = first_last_bits
        self.pins = dict(pins or {})
        self.strategy = strategy.to_json() if isinstance(strategy, Strategy) else strategy
        self._validate()
        super().__init__(**kwargs)

    def _validate(self) -> None:
        _one_of("granularity", self.granularity, GRANULARITIES)
        _one_of("weight_quantizer", self.weight_quantizer, FORMS)
        _one_of("weight_grid", self.weight_grid, GRIDS)
        if not isinstance(self.architecture, str) or not self.architecture:
            raise ValueError(f"architecture must be a timm model name, got {self.architecture!r}.")
        if not isinstance(self.candidates, list) or not self.candidates:
            raise ValueError(f"candidates must be a list of bitwidths from 1 to 8, got {self.candidates!r}.")
        for bits in self.candidates:
            _check_bits("candidates", bits, float_allowed=False)
        if len(set(self.candidates)) != len(self.candidates):
            raise ValueError(f"candidates must differ from each other, got {self.candidates}.")
        _check_bits("activation_bits", self.activation_bits)
        _check_bits("first_last_bits", self.first_last_bits)
        for pattern, bits in self.pins.items():
            _check_bits(f"pins[{pattern!r}]", bits)
        if "num_classes" in self.model_args:
            raise ValueError("model_args must not hold num_classes: set num_labels (or id2label) instead.")
        if self.strategy is not None:
            Strategy.from_json(self.strategy)

    def pinned_bits(self, name: str) -> int | None:
        """Weight bits that `pins` give layer `name`, None when no pattern matches."""
        matches = [bits for pattern, bits in self.pins.items() if fnmatch.fnmatchcase(name, pattern)]
        return matches[-1] if matches else None

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images."""
        size = (self.pretrained_cfg or {}).get("input_size") or (self.model_args.get("in_chans", 3), 224, 224)
        return tuple(size)  # type: ignore[return-value]


def _check_bits(field: str, bits: Any, float_allowed: bool = True) -> None:
    valid = isinstance(bits, int) and not isinstance(bits, bool) and 1 <= bits <= 8
    if not valid and not (float_allowed and bits == FLOAT_BITS):
        extra = f" (or {FLOAT_BITS} for float)" if float_allowed else ""
        nearest = f"; the nearest is {min(8, max(1, round(bits)))}" if isinstance(bits, int | float) else ""
        raise ValueError(f"{field} must be a whole number from 1 to 8{extra}, got {bits!r}{nearest}.")


def _one_of(field: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{field} must be one of {', '.join(choices)}, got {value!r}.{hint}")
