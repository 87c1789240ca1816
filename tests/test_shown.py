"""What may be shown of a text: no password, and nothing that steers a terminal."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aliprod.errors import Refused
from aliprod.shown import escaped, lines, redacted

CANARY = "hunter2"


@pytest.mark.parametrize(
    ("address", "left"),
    [
        (f"http://user:{CANARY}@host:5000/a", "http://host:5000/a"),
        (f"http://user:a/{CANARY}@host", "http://host"),
        (f"http://user:a {CANARY} b@host", "http://host"),
        (f"http://user:{CANARY}@more@host", "http://host"),
        (f'http://user:a"{CANARY}@host', "http://host"),
        (f'http://user:{CANARY}"@host:5000/a', "http://host:5000/a"),
        (f'http://user:a/"b {CANARY}@host', "http://host"),
        (f'user:a"{CANARY}@host:5000', "host:5000"),
        (f'http://host/?token=a"{CANARY}', "http://host/?token=..."),
        (f"http://{CANARY}@host", "http://host"),
        (f"postgresql+psycopg2://user:{CANARY}@host/db", "postgresql+psycopg2://host/db"),
        (f"user:{CANARY}@host:5000", "host:5000"),
        (f"user:{CANARY} b@host:5000", "host:5000"),
        (f"http://user:{CANARY}@[::1", "http://[::1"),
        (f"http://host/?token={CANARY}&x=1", "http://host/?token=...&x=1"),
        (f"http://host/?x=1&password=a {CANARY}", "http://host/?x=1&password=..."),
        (f"s3://bucket/x?aws_secret_access_key={CANARY}", "s3://bucket/x?aws_secret_access_key=..."),
    ],
)
@pytest.mark.parametrize("text", ["{}", '{{"uri": "{}", "a": "b@c"}}', "plan.toml: {}\n  Do x@y."])
def test_of_an_address_no_secret_is_shown_and_the_rest_is(address: str, left: str, text: str) -> None:
    if address.startswith("user:") and " " in address and text != "{}":
        pytest.skip("a blank in a password without a scheme before it is a word's end in a sentence")
    shown = redacted(text.format(address))
    assert CANARY not in shown
    assert left.partition("&")[0] in shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "models:/quickstart.resnet50.dcl@member",
        "13:00:01  MLflow: http://127.0.0.1:5000/#/experiments/1 and models:/a.b@member",
        "http://host/#/experiments/1/runs?orderByKey=metrics.%60best%60&orderByAsc=true",
        "write to somebody@example.org",
        "s3://bucket/folder?endpoint_override=127.0.0.1:9000",
        '{"uri": "http://host:5000", "by": "somebody@example.org"}',
        '{"uri":"http://host:5000/a","by":"somebody@example.org"}',
        'uri = "http://host:5000" # somebody@example.org',
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


@given(st.text())
def test_an_escaped_text_is_one_printable_line_and_the_same_json(text: str) -> None:
    shown = escaped(text)
    assert len(shown.splitlines()) <= 1
    assert not any(ord(one) < 32 or 0x7F <= ord(one) < 0xA0 for one in shown)
    assert json.loads(escaped(json.dumps(text, ensure_ascii=False))) == text


@pytest.mark.parametrize("odd", ["\x1b[2J", "\r", "\n", "\x9b", "\u202e", "\u2028", "\udcff"])
def test_an_error_about_an_odd_name_is_the_lines_that_it_says(odd: str) -> None:
    said = str(Refused("is wrong.", f"a{odd}b", "Do this.\nDo that."))
    assert said == f"a\\u{ord(odd[0]):04x}{odd[1:]}b: is wrong.\n  Do this.\n  Do that."
    assert lines(said) == said
