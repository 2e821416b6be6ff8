"""Redact credentials in texts that are written down: messages of other libraries can quote them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

#: stands where a secret stood
REDACTED = "[redacted]"
#: shorter values are words that occur in any text
_SHORTEST = 8
#: environment variables whose values are secrets, by their names
_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE|PRIVATE", re.IGNORECASE)
#: what looks like a secret wherever it is from; the group is kept
_SHAPES = (
    re.compile(r"\b([a-z][a-z0-9+.-]*://)[^/\s:@]*:[^/\s@]+(?=@)", re.IGNORECASE),  # scheme://user:password@
    re.compile(r"((?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE),
    re.compile(r"([?&][^=&\s]*(?:token|key|sig|signature|secret|password|credential)=)[^&\s'\"]+", re.I),
    re.compile(
        r"\b()(?:(?:hf_|gh[pousr]_|github_pat_|glpat-|npm_|xox[abprs]-|sk-)[A-Za-z0-9_-]{16,}"
        r"|(?:AKIA|ASIA)[0-9A-Z]{16}\b|AIza[A-Za-z0-9_-]{35}\b)"  # keys of services
    ),
    re.compile(r"\b()eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+"),  # a JSON web token
    re.compile(r"()-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----|.*)", re.DOTALL),
)
#: a name of which a word says that it holds one; a file's key and a token of a text are other things
_SECRET_WORD = re.compile(
    r"(^|[^a-z])((api|access|secret|private)_?keys?|secrets?|passwords?|passwd|passphrase|credentials?|pat"
    r"|(auth|access)?_?tokens?|keys?)($|[^a-z])",
    re.I,
)
#: where a word begins in the midst of a name
_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def names_a_secret(name: str) -> bool:
    """Whether a variable or an option of that name holds a secret.

    >>> names_a_secret("api_key"), names_a_secret("entity")
    (True, False)
    """
    return _SECRET_NAME.search(name) is not None


def looks_like_a_secret(text: str, name: str = "") -> bool:
    """Whether a value that somebody wrote into a study is a credential, by its form or by its name.

    >>> looks_like_a_secret("hf_" + 20 * "x"), looks_like_a_secret("abc", "HF_TOKEN")
    (True, True)
    >>> looks_like_a_secret("abc", "accessToken"), looks_like_a_secret("abc", "tokenizer")
    (True, False)
    """
    words = _WORD.sub("_", name)
    return any(shape.search(text) for shape in _SHAPES) or bool(text and _SECRET_WORD.search(words))


def redacted(text: str) -> str:
    """``text`` without the values of the environment's secrets, passwords in addresses, and tokens.

    >>> redacted("cannot open https://me:pass@example.org/x?token=123")
    'cannot open https://[redacted]@example.org/x?token=[redacted]'
    """
    values = {v for name, v in os.environ.items() if names_a_secret(name) and len(v) >= _SHORTEST}
    for value in sorted(values, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, REDACTED)
    for shape in _SHAPES:
        text = shape.sub(rf"\1{REDACTED}", text)
    return text


def redacted_all(content: Any) -> Any:
    """A JSON-able value, each text in it `redacted`.

    >>> redacted_all({"a": ["https://me:pass@example.org", 3]})
    {'a': ['https://[redacted]@example.org', 3]}
    """
    if isinstance(content, str):
        return redacted(content)
    if isinstance(content, Mapping):
        return {redacted_all(key): redacted_all(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [redacted_all(value) for value in content]
    return content
