"""Strategy: how many bits each layer has, as a value."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from numbers import Integral
from typing import Any

from .packing import packed_size

FLOAT_BITS = 32
# More than any network has; a file from the Hub could name millions.
MAX_LAYERS = 10_000
MAX_CHANNELS = 100_000


@dataclass(frozen=True)
class LayerBits:
    """One layer: its bits, and the sizes that costs are computed from.

    weight_bits: 1 to 8, or 32 for a layer that stays float; a tuple with 1 to 8 for each output channel where each has its
    own (granularity "kernel"). activation_bits: bits of the layer's input, 1 to 8, or 32 for
    float. num_weights: weights without bias. macs: multiply-accumulates for one image at the configured image size.
    pinned: outside the search (first and last layer, and pins).
    """

    weight_bits: int | tuple[int, ...]
    activation_bits: int
    num_weights: int
    macs: int
    pinned: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.weight_bits, tuple):
            if not self.weight_bits or not all(_is_bits(bits) and bits != FLOAT_BITS for bits in self.weight_bits):
                raise ValueError(f"weight_bits of channels must be 1 to 8 each, got {short(self.weight_bits)}.")
        elif not _is_bits(self.weight_bits):
            raise ValueError(f"weight_bits must be 1 to 8, or {FLOAT_BITS} for float, got {short(self.weight_bits)}.")
        if not _is_bits(self.activation_bits):
            raise ValueError(
                f"activation_bits must be 1 to 8, or {FLOAT_BITS} for float, got {short(self.activation_bits)}."
            )
        for field in ("num_weights", "macs"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 10**15:
                raise ValueError(f"{field} must be a whole number >= 0, got {short(value)}.")
        if not isinstance(self.pinned, bool):
            raise ValueError(f"pinned must be true or false, got {short(self.pinned)}.")
        if isinstance(self.weight_bits, tuple) and (self.num_weights % (n := len(self.weight_bits)) or self.macs % n):
            raise ValueError(
                f"num_weights {self.num_weights} and macs {self.macs} must be multiples of its {n} channels."
            )

    @property
    def total_bits(self) -> int:
        """Bits of all weights."""
        if isinstance(self.weight_bits, tuple):
            return self.num_weights // len(self.weight_bits) * sum(self.weight_bits)
        return self.num_weights * self.weight_bits

    @property
    def average_bits(self) -> float:
        """Of a weight."""
        bits = self.weight_bits
        return sum(bits) / len(bits) if isinstance(bits, tuple) else float(bits)

    @property
    def num_bytes(self) -> int:
        """Of the packed weights, filled up to a whole byte."""
        return packed_size(self.total_bits, 1)

    @property
    def bitops(self) -> int:
        """MACs * weight bits * activation bits for one image."""
        if isinstance(self.weight_bits, tuple):
            return self.macs // len(self.weight_bits) * sum(self.weight_bits) * self.activation_bits
        return self.macs * self.weight_bits * self.activation_bits

    @property
    def is_float(self) -> bool:
        """Whether neither weights nor inputs are quantized."""
        return self.weight_bits == self.activation_bits == FLOAT_BITS


@dataclass(frozen=True)
class Strategy(Mapping[str, LayerBits]):
    """Layer name -> `LayerBits`, in the network's order. Immutable; `with_bits` makes a changed copy.

    The paper calls it MPQ strategy. Averages weigh each layer by its number of weights; "searchable" leaves out the
    pinned layers. A cost method counts every layer unless told otherwise.
    """

    layers: tuple[tuple[str, LayerBits], ...]

    @classmethod
    def of(cls, layers: Mapping[str, LayerBits]) -> "Strategy":
        return cls(tuple(layers.items()))

    # Mapping -----------------------------------------------------------------------------------------------------

    @cached_property
    def _by_name(self) -> dict[str, LayerBits]:
        return dict(self.layers)

    def __getitem__(self, name: str) -> LayerBits:
        if name not in self._by_name:
            raise KeyError(unknown_layer(name, list(self._by_name)))
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __hash__(self) -> int:
        return hash(self.layers)

    # Bits --------------------------------------------------------------------------------------------------------

    @property
    def weight_bits(self) -> dict[str, int | tuple[int, ...]]:
        return {name: layer.weight_bits for name, layer in self.layers}

    @property
    def searchable(self) -> tuple[str, ...]:
        """Names of the layers that are not pinned."""
        return tuple(name for name, layer in self.layers if not layer.pinned)

    def with_bits(self, bits: int | Mapping[str, int | tuple[int, ...]]) -> "Strategy":
        """A copy with other weight bits: one number for every searchable layer, or layer name -> bits.

        A number is for all channels of a layer whose channels have bits of their own. Raises `KeyError` for an unknown layer,
        `ValueError` that names the layer for bits that are not 1 to 8 (or 32).
        """
        if not isinstance(bits, Mapping):
            if not is_whole(bits):
                raise ValueError(f"Weight bits must be a whole number, or layer name -> bits, got {short(bits)}.")
            bits = dict.fromkeys(self.searchable, bits)

        def of_layer(own: Any, width: Any) -> Any:
            whole = is_whole(width) and width != FLOAT_BITS
            return (width,) * len(own) if whole and isinstance(own, tuple) else width

        return self._with(
            "weight_bits", {name: of_layer(self[name].weight_bits, width) for name, width in bits.items()}
        )

    def with_activation_bits(self, bits: Mapping[str, int]) -> "Strategy":
        """A copy with other bits of inputs: layer name -> bits. Errors as in `with_bits`."""
        return self._with("activation_bits", bits)

    def _with(self, field: str, bits: Mapping[str, Any]) -> "Strategy":
        layers = dict(self.layers)
        for name, width in bits.items():
            change: dict[str, Any] = {field: tuple(map(_as_int, width)) if isinstance(width, tuple) else _as_int(width)}
            layer = self[name]
            try:
                layers[name] = replace(layer, **change)
            except ValueError as error:
                raise ValueError(f"Layer {short(name)}: {error}") from None
        return Strategy.of(layers)

    # Costs -------------------------------------------------------------------------------------------------------

    def _counted(self, include_pinned: bool) -> list[LayerBits]:
        return [layer for _, layer in self.layers if include_pinned or not layer.pinned]

    def average_bits(self, include_pinned: bool = False) -> float:
        """sum N_l b_l / sum N_l over the searchable layers, or over all with `include_pinned`."""
        layers = self._counted(include_pinned) or self._counted(True)
        return sum(x.total_bits for x in layers) / sum(x.num_weights for x in layers)

    def compression(self, include_pinned: bool = True) -> float:
        """32 / average bits: how many times smaller the weights are than float32."""
        return FLOAT_BITS / self.average_bits(include_pinned)

    def weight_bytes(self, include_pinned: bool = True) -> int:
        """Bytes of the packed weights, each layer filled up to a whole byte."""
        return sum(x.num_bytes for x in self._counted(include_pinned))

    def bitops(self, include_pinned: bool = True) -> int:
        """sum MACs * weight bits * activation bits for one image (METHOD 6.7)."""
        return sum(x.bitops for x in self._counted(include_pinned))

    # JSON and text -----------------------------------------------------------------------------------------------

    def to_json(self) -> list[dict[str, Any]]:
        """A plain list that JSON can hold: a list, since transformers sorts the keys of a mapping in config.json.

        Bits of channels are a text with a digit for each.
        """
        entries = [{"layer": name, **asdict(layer)} for name, layer in self.layers]
        for entry in entries:
            if isinstance(entry["weight_bits"], tuple):
                entry["weight_bits"] = "".join(map(str, entry["weight_bits"]))
        return entries

    @classmethod
    def from_json(cls, data: list[dict[str, Any]] | str) -> "Strategy":
        """The inverse of `to_json`; also takes its text. Raises `ValueError` that names the layer and the field."""
        if isinstance(data, str):
            try:
                data = json.loads(data)
            except ValueError as error:
                raise ValueError(f"A strategy's text must be JSON, got {short(data)}: {error}") from error
        if not isinstance(data, list):
            raise ValueError(f"A strategy is a list of layers with bits and sizes, got {type(data).__name__}.")
        if len(data) > MAX_LAYERS:
            raise ValueError(f"A strategy has at most {MAX_LAYERS} layers, got {len(data)}.")
        fields = {"layer", *LayerBits.__dataclass_fields__}
        layers: dict[str, LayerBits] = {}
        for entry in data:
            if not isinstance(entry, Mapping) or not fields - {"pinned"} <= set(entry) <= fields:
                raise ValueError(f"A strategy's entry must have the fields {sorted(fields)}, got {short(entry)}.")
            name, values = entry["layer"], {k: v for k, v in entry.items() if k != "layer"}
            if not isinstance(name, str) or not name.isprintable():
                raise ValueError(f"A strategy's layers have printable names, got {short(name)}.")
            if name in layers:
                raise ValueError(f"A strategy names each layer once, got {short(name)} again.")
            digits = values["weight_bits"]
            if isinstance(digits, str) and len(digits) <= MAX_CHANNELS and digits.isascii() and digits.isdigit():
                values["weight_bits"] = tuple(int(digit) for digit in digits)
            try:
                layers[name] = LayerBits(**values)
            except ValueError as error:
                raise ValueError(f"Strategy, layer {short(name)}: {error}") from None
        return cls.of(layers)

    def diff(self, other: "Strategy") -> dict[str, tuple[Any, Any]]:
        """Layers whose weight bits differ: name -> (bits here, bits in `other`), None where a side lacks the layer."""
        mine, theirs = self.weight_bits, other.weight_bits
        names = list(mine) + [name for name in theirs if name not in mine]
        return {name: (mine.get(name), theirs.get(name)) for name in names if mine.get(name) != theirs.get(name)}

    def table(self) -> str:
        """A text table: one line a layer, the averages below."""
        width = max([len("layer")] + [len(name) for name in self])
        lines = [f"{'layer':{width}}  W bits  A bits  {'weights':>10}  {'MACs':>13}"]
        for name, x in self.layers:
            a_bits = bits_text(x.activation_bits)
            w_bits = bits_text(x.weight_bits)
            pin = "  pinned" if x.pinned else ""
            lines.append(f"{name:{width}}  {w_bits:>6}  {a_bits:>6}  {x.num_weights:>10,}  {x.macs:>13,}{pin}")
        lines.append(
            f"average bits {self.average_bits():.2f} (with pinned layers {self.average_bits(True):.2f}), "
            f"weights {self.weight_bytes() / 1e3:,.1f} kB, {self.compression():.1f}x smaller than float, "
            f"{self.bitops() / 1e9:.3f} GBitOPs"
        )
        return "\n".join(lines)

    __str__ = table


def bits_text(bits: int | tuple[int, ...]) -> str:
    """`3`, `float`, or for channels with bits of their own their mean, `~2.41`."""
    if isinstance(bits, tuple):
        return f"~{sum(bits) / len(bits):.2f}"
    return "float" if bits == FLOAT_BITS else str(bits)


def _is_bits(bits: Any) -> bool:
    return isinstance(bits, int) and not isinstance(bits, bool) and (1 <= bits <= 8 or bits == FLOAT_BITS)


def is_whole(value: Any) -> bool:
    """Whether `value` is a whole number, of Python or of numpy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _as_int(value: Any) -> Any:
    """A whole number as Python's int; what else it may be is left for the check of the field."""
    return int(value) if is_whole(value) else value


def short(value: Any, longest: int = 100) -> str:
    """`value` as text of at most `longest` characters, for a message of one line."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def unknown_layer(name: str, names: list[str]) -> str:
    """The message for a layer name that is not among `names`."""
    near = get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
    return f"No layer {short(name)} in the network; near names: {', '.join(near)}."
