"""Numbers of tokens as people write them."""

import pytest

from nemotron_h_hf.token_counts import parse_tokens


@pytest.mark.parametrize(
    ("written", "tokens"),
    [
        ("15T", 15 * 10**12), ("6.3B", 6_300_000_000), ("1.5b", 1_500_000_000), ("2.5M", 2_500_000), ("4k", 4000),
        ("4 K", 4000), ("1e6", 10**6), (1e6, 10**6), (7, 7), ("2_000", 2000), ("6,291,456", 6_291_456), (0, 0),
    ],
)  # fmt: skip
def test_numbers(written, tokens):
    assert parse_tokens(written, "x") == parse_tokens(written, "x", 5) == tokens


@pytest.mark.parametrize(("written", "tokens"), [("20%", 1000), ("12.5 %", 625), ("0%", 0), ("100%", 5000)])
def test_shares_of_a_run(written, tokens):
    assert parse_tokens(written, "x", 5000) == tokens


@pytest.mark.parametrize("wrong", ["-1", "-5K", "many", "", "inf", "nan", "5Q", "3X", "%", True, None, [1]])
def test_what_is_no_number_of_tokens(wrong):
    for total in (None, 5000):
        with pytest.raises(ValueError, match=r"^x: got .*, allowed is a number of tokens such as 2500000, 4K"):
            parse_tokens(wrong, "x", total)


def test_a_share_of_nothing():
    with pytest.raises(ValueError, match=r"x: got '20%', allowed is [^%]*$"):
        parse_tokens("20%", "x")
    with pytest.raises(ValueError, match="or a share such as 20%"):
        parse_tokens("some", "x", 10)
