"""Numbers of tokens as people write them."""

import pytest

from nemotron_h_hf.units import human_bytes, parse_bytes, parse_need, parse_tokens


@pytest.mark.parametrize(
    ("written", "tokens"),
    [
        ("15T", 15 * 10**12), ("6.3B", 6_300_000_000), ("1.5b", 1_500_000_000), ("2.5M", 2_500_000), ("4k", 4000),
        ("4 K", 4000), ("1e6", 10**6), (1e6, 10**6), (7, 7), ("2_000", 2000),
        ("4Ki", 4096), ("32ki", 32_768), ("1.5Mi", 3 * 2**19), ("1G", 10**9), ("6,291,456", 6_291_456), (0, 0),
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
        with pytest.raises(ValueError, match=r"^x=.*: allowed is a number of tokens such as 2500000, 4K"):
            parse_tokens(wrong, "x", total)


def test_a_share_of_nothing():
    with pytest.raises(ValueError, match=r"x='20%': allowed is [^%]*$"):
        parse_tokens("20%", "x")
    with pytest.raises(ValueError, match="or a share such as 20%"):
        parse_tokens("some", "x", 10)


@pytest.mark.parametrize(
    ("written", "num_bytes"),
    [
        ("5GB", 5 * 10**9), ("2GiB", 2**31), ("500 mb", 5 * 10**8), (7, 7), ("12B", 12), ("1.5KiB", 1536), ("1e3KB", 10**6),
        (".5TiB", 2**39), ("1TB", 10**12), ("3MiB", 3 * 2**20),
    ],
)  # fmt: skip
def test_bytes(written, num_bytes):
    assert parse_bytes(written, "x") == num_bytes


@pytest.mark.parametrize("wrong", ["much", "0", "5G", "5Ki", "-1GB", "1e999", "10%", "0.1", True, None, ""])
def test_what_is_no_number_of_bytes(wrong):
    with pytest.raises(ValueError, match="^x=.*: allowed is a size such as 5GB, 500MB or 2GiB$"):
        parse_bytes(wrong, "x")


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize(
    "num_bytes", [1, 999, 1024, 1025, 5 * 2**20, 5 * 2**20 + 1, 2**20 - 1, 34_016_000_001, 3 * 2**45]
)
def test_a_least_size_that_is_told_is_enough(num_bytes, digits):
    told = parse_bytes(human_bytes(num_bytes, digits=digits, up=True), "x")
    assert num_bytes <= told <= num_bytes * (1 + 10.0**-digits)


def test_bytes_for_people():
    assert [human_bytes(n) for n in (0, 1023, 1536, 5 * 2**20 + 1, 2**41)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "2.0 TiB",
    ]
    assert human_bytes(5 * 2**20 + 1, up=True) == "5.1 MiB" and human_bytes(3 * 2**29, digits=2, up=True) == "1.50 GiB"


def test_needs():
    assert parse_need("7GiB@32k") == (7 * 2**30, 32_000)
    assert parse_need("7GiB@32Ki") == (7 * 2**30, 32_768)
    assert parse_need("0.5 GB") == (5 * 10**8, 0)
    for wrong in ("7@32Ki", "7GiB@", "6b", "7GiB@x", "@5"):
        with pytest.raises(ValueError):
            parse_need(wrong)
