"""What may be shown of a text from elsewhere: no password, and nothing that steers a terminal or forges a line."""

import re

_QUOTE = r'"(?![\s,;:.)}>\]]|$)'  # inside of a secret; before these it ends a string of JSON, TOML or a sentence
_SECRETS = re.compile(
    rf"""
    (?<=://)(?:[^\s/"]|{_QUOTE})*@                                      # user and password of an address
    | (?<=://)[^\s/":@]*:(?:(?!://|models:/)(?:[^"\n]|{_QUOTE}))*@      # with / and blanks in the password
    | (?<![\w/.%+-])[\w.%+-]+:(?![/\s])(?:[^\s"@]|{_QUOTE})+@          # the same without a scheme
    | \A(?!\d\d:\d\d:\d\d\ )[^\s:/"]+:(?![/\s])(?:[^"\n]|{_QUOTE})*@  # and with blanks, where it is all of the text
    | (?<=[?&;])(?P<name>[^\s=&"]*(?:token|passw|pwd|secret|api_?key|access_?key|signature|credential)
        [^\s=&"]*=)(?:[^&"\n]|{_QUOTE})*
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
# C0 and C1, marks that turn the direction of writing, separators of lines, halves of characters.
UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def redacted(text: str) -> str:
    """The text without the user and password of every address in it, and without tokens in its query."""
    return _SECRETS.sub(lambda found: f"{found['name']}..." if found["name"] else "", text)


def escaped(text: str) -> str:
    """The text in one line, with ``\\u001b`` for a character that is not seen. JSON stays the same JSON."""
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def lines(text: str) -> str:
    """The text with its own line breaks, all else as in `redacted` and `escaped`."""
    return "\n".join(map(escaped, redacted(text).split("\n")))
