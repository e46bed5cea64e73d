"""Schemes parse, print, and know their codes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.errors import UsageError
from onnxq.scheme import Granularity, QuantScheme


@st.composite
def schemes(draw: st.DrawFn) -> QuantScheme:
    kinds: list[Granularity] = ["tensor", "channel", "block"]
    granularity = draw(st.sampled_from(kinds))
    block = draw(st.integers(1, 4096)) if granularity == "block" else 0
    bits, signed, symmetric = draw(st.integers(2, 8)), draw(st.booleans()), draw(st.booleans())
    return QuantScheme(bits, signed, symmetric, granularity, block)


@given(schemes())
def test_text_round_trip(scheme: QuantScheme) -> None:
    assert QuantScheme.parse(str(scheme)) == scheme
    assert str(QuantScheme.parse(str(scheme))) == str(scheme)


@given(schemes())
def test_codes_fill_the_bits(scheme: QuantScheme) -> None:
    assert scheme.qmax - scheme.qmin + 1 == 2**scheme.bits
    assert (scheme.qmin < 0) == scheme.signed
    assert scheme.midpoint == (scheme.qmin + scheme.qmax + 1) / 2


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("int8", QuantScheme(8, True, True)),
        ("uint8", QuantScheme(8, False, False)),
        ("uint4:symmetric", QuantScheme(4, False, True)),
        ("int8:channel:asymmetric", QuantScheme(8, True, False, "channel")),
        ("int8:asymmetric:channel", QuantScheme(8, True, False, "channel")),
        (" int4:block=32 ", QuantScheme(4, True, True, "block", 32)),
        ("int2:tensor", QuantScheme(2, True, True)),
    ],
)
def test_reading(text: str, scheme: QuantScheme) -> None:
    assert QuantScheme.parse(text) == scheme


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("", "''"),
        ("int", "'int'"),
        ("int1", "'int1'"),
        ("uint9", "'uint9'"),
        ("float8", "'float8'"),
        ("INT8", "'INT8'"),
        ("uuint8", "'uuint8'"),
        ("int-8", "'int-8'"),
        ("int8:", "''"),
        ("int8:row", "'row'"),
        ("int8:channel=1", "'channel=1'"),
        ("int8:channel=", "'channel='"),
        ("int8:block", "'block'"),
        ("int8:block=0", "'block=0'"),
        ("int8:block=-4", "'block=-4'"),
        ("int8:symmetric=yes", "'symmetric=yes'"),
        ("int8:block=32:channel", "'channel'"),
        ("int8:tensor:block=8", "'block=8'"),
        ("int8:symmetric:asymmetric", "'asymmetric'"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_grammar(text: str, culprit: str) -> None:
    with pytest.raises(UsageError) as error:
        QuantScheme.parse(text)
    assert f"cannot read {culprit} in the scheme" in str(error.value) or f"the scheme {culprit}" in str(
        error.value
    )
    assert ":block=N" in str(error.value)
