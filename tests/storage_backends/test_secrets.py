"""Credentials in URLs, options and the environment are found, and stay out of what people see."""

from __future__ import annotations

from typing import Any

import pytest

from dcp_engine.errors import StorageError, UsageError
from dcp_engine.redaction import redact_url
from storage_backends.secrets import Secrets, is_secret_name
from storage_backends.url_options import split_query


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/run", "s3://bucket/run"),
        ("s3://AKIA:sEcReT@bucket/run", "s3://***@bucket/run"),
        ("s3://AKIA:sE/cR@eT@bucket/run", "s3://***@bucket/run"),
        ("sftp://user@host:22/a@b/c", "sftp://***@host:22/a@b/c"),
        ("https://host/run?X-Amz-Signature=abc#x", "https://host/run?***"),
        ("s3://b/k?a@b=c", "s3://b/k?***"),
        ("simplecache::s3://k:s@b/x?key=1", "simplecache::s3://***@b/x?***"),
        ("zip://a::sftp://u:p@h/x.zip", "zip://a::sftp://***@h/x.zip"),
        ("/plain/path@home?x", "/plain/path@home?x"),
        ("relative:path@x", "relative:path@x"),
        ("file:///home/u@corp/run", "file:///home/u@corp/run"),
        ("", ""),
    ],
)
def test_urls_in_messages(url: str, shown: str) -> None:
    assert redact_url(url) == shown
    error = StorageError("could not", checkpoint=url)
    assert error.checkpoint == shown
    assert StorageError("could not").with_context(checkpoint=url).checkpoint == shown


@pytest.mark.parametrize(
    "name",
    ["key", "secret", "aws_session_token", "password", "passphrase", "sas_token", "account_key",
     "connection_string", "X-Amz-Signature", "credential", "Authorization"],
)  # fmt: skip
def test_names_of_credentials(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["key_filename", "endpoint_url", "region", "host", "port", "token_path", "anon"]
)
def test_names_of_other_options(name: str) -> None:
    assert not is_secret_name(name)


def test_credentials_are_taken_out_wherever_they_come_from() -> None:
    secrets = Secrets(
        "simplecache::sftp://user:pa%20ss-word@host/run?token=from-query&region=eu",
        {
            "key": "access-key-id",
            "client_kwargs": {"aws_session_token": "from-a-dictionary", "verify": "no-secret"},
            "tokens": ["first-token", "second-token"],
            "raw_key": b"some-bytes",
            "password": "abc",
            "endpoint": "http://host",
        },
        {"AWS_SECRET_ACCESS_KEY": "from-environment", "HOME": "/home/somebody"},
    )
    text = (
        "pa%20ss-word, pa ss-word, from-query, access-key-id, from-a-dictionary, first-token, "
        "second-token, some-bytes, abc, from-environment"
    )
    assert secrets.scrub(text) == ", ".join(["***"] * 10)
    assert secrets.are_in("x from-query y")
    plain = "user at http://host and eu, no-secret in /home/somebody, abcdef"
    assert secrets.scrub(plain) == plain
    assert not secrets.are_in(plain)


def test_a_user_without_a_password_may_be_a_token() -> None:
    assert Secrets("https://ghp_token@host/x", {}, {}).scrub("ghp_token") == "***"
    assert Secrets("sftp://root@host/x", {}, {}).scrub("/root/x") == "/root/x"


def test_nothing_secret() -> None:
    assert Secrets("s3://bucket/x", {}, {}).scrub("text") == "text"


# The query of a URL


@pytest.mark.parametrize(
    ("url", "place", "options"),
    [
        ("s3://b/k", "s3://b/k", {}),
        (
            "s3://b/k?endpoint_url=http%3A%2F%2Fh%3A1&anon=true&streams=4&x=-2&y=None&z=",
            "s3://b/k",
            {"endpoint_url": "http://h:1", "anon": True, "streams": 4, "x": -2, "y": None, "z": ""},
        ),
        ("sftp://h/p?password=123456", "sftp://h/p", {"password": "123456"}),
        (
            'a::s3://b/k?client_kwargs={"region_name":"eu"}&l=[1]',
            "a::s3://b/k",
            {"client_kwargs": {"region_name": "eu"}, "l": [1]},
        ),
        ("a?x=1::s3://b/k", "a?x=1::s3://b/k", {}),
        ("https://host/run?signed=1", "https://host/run?signed=1", {}),
        ("/a/path?with=question", "/a/path?with=question", {}),
    ],
)
def test_queries(url: str, place: str, options: dict[str, Any]) -> None:
    assert split_query(url) == (place, options)


def test_queries_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="twice"):
        split_query("s3://b/k?a=1&a=2")
    with pytest.raises(UsageError, match="JSON") as caught:
        split_query("s3://b/k?client_kwargs={secret")
    assert "secret" not in str(caught.value)
