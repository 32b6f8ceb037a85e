"""Options in a URL that are no options are a mistake of the call, whatever they hold."""

from __future__ import annotations

import pytest

from dcp_engine.errors import UsageError
from storage_backends.url_options import split_query


@pytest.mark.parametrize(
    "value",
    ["9" * 5000, "-" + "9" * 5000, "[" * 100_000, '{"a":' * 100_000, "[" + "9" * 5000 + "]", "[1"],
    ids=["digits", "negative", "lists", "objects", "digits in JSON", "no JSON"],
)
def test_a_value_that_cannot_be_read(value: str) -> None:
    with pytest.raises(UsageError):
        split_query(f"s3://bucket/run?a={value}")


def test_an_option_twice() -> None:
    with pytest.raises(UsageError, match="twice"):
        split_query("s3://bucket/run?a=1&%61=2")


def test_large_numbers_are_numbers() -> None:
    assert split_query("s3://bucket/run?a=" + "9" * 30) == ("s3://bucket/run", {"a": 10**30 - 1})
