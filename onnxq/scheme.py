"""What a quantized tensor looks like: bits, sign, symmetry, granularity; a value that parses and prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnxq.errors import UsageError

BYTE = 8  # bits of a code of the kernels, the widest here
Granularity = Literal["tensor", "channel", "block"]

GRAMMAR = (
    "intB or uintB (B from 2 to 8), then one of :tensor, :channel, :block=N, one of :symmetric, :asymmetric"
)


@dataclass(frozen=True)
class QuantScheme:
    """An integer grid without its scale.

    Attributes:
        bits: width of a code, 2 to 8.
        signed: whether codes are two's complement.
        symmetric: whether the zero point is fixed: 0 when signed, 2^(bits-1) when not.
        granularity: one scale for the `tensor`, for each `channel`, or for each `block` of a channel.
        block: length of a block along the reduction axis, 0 unless granularity is `block`.

    >>> QuantScheme.parse("int8:channel").qmin
    -128
    >>> str(QuantScheme.parse("int4:block=32"))
    'int4:block=32'
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    granularity: Granularity = "tensor"
    block: int = 0

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric grid."""
        return 0 if self.signed else 1 << (self.bits - 1)

    @classmethod
    def parse(cls, text: str) -> QuantScheme:
        """Read a scheme such as `int8:channel`, `uint8` or `int4:block=32`.

        Signed schemes are symmetric and unsigned ones asymmetric unless the text says otherwise.

        Raises:
            UsageError: the text does not follow the grammar, or contradicts itself.
        """
        kind, *options = text.strip().split(":")
        prefix = "uint" if kind.startswith("uint") else "int"
        digits = kind.removeprefix(prefix)
        if not kind.startswith(prefix) or not digits.isdecimal() or not 2 <= int(digits) <= 8:
            raise UsageError(f"cannot read the scheme {text!r}; it is {GRAMMAR}")
        signed = prefix == "int"
        symmetric: bool | None = None
        granularity: Granularity | None = None
        block = 0
        for option in options:
            name, _, value = option.partition("=")
            if granularity is None and option in ("tensor", "channel"):
                granularity = "tensor" if option == "tensor" else "channel"
            elif granularity is None and name == "block" and value.isdecimal() and int(value) > 0:
                granularity, block = "block", int(value)
            elif symmetric is None and option in ("symmetric", "asymmetric"):
                symmetric = option == "symmetric"
            else:
                raise UsageError(f"cannot read {option!r} in the scheme {text!r}; it is {GRAMMAR}")
        return cls(
            int(digits), signed, signed if symmetric is None else symmetric, granularity or "tensor", block
        )

    def __str__(self) -> str:
        text = f"{'' if self.signed else 'u'}int{self.bits}"
        if self.granularity != "tensor":
            text += f":block={self.block}" if self.block else f":{self.granularity}"
        if self.symmetric != self.signed:
            text += ":symmetric" if self.symmetric else ":asymmetric"
        return text
