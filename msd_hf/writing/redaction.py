"""Removing secrets and local paths from what is saved, uploaded or sent to a tracker."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any


REDACTED = "<redacted>"

# A name is secret if it contains one of these,
_SECRET_PARTS = ("password", "passwd", "passphrase", "secret", "credential", "apikey", "accesskey", "privatekey")
# or if its last word is one of these. Counts (`max_new_tokens`) and ids (`eos_token_id`) are not secret.
_SECRET_ENDS = frozenset(("token", "key", "auth", "authorization", "pass", "pwd", "pat", "cookie", "signature", "sig"))
_SECRET_LISTS = re.compile(r"(?:access|api|auth|bearer|hf|hub|refresh)tokens$")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# Texts are searched for the values of secrets. Shorter values would be found by chance.
_SHORTEST_SECRET = 6

# Values that are secret by their form: tokens of the Hub, of forges, models and clouds, and JSON web tokens.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{10,}|api_org_[A-Za-z0-9]{10,}|sk-[\w-]{16,}|gh[a-z]_\w{16,}"
    r"|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[a-z]-[\w-]{8,}|AKIA[0-9A-Z]{12,}|AIza[\w-]{24,}"
    r"|eyJ[\w-]{8,}\.[\w-]+\.[\w-]+)"
)
_BEARER = re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE)
_VALUE = r"""(?P<value>"(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?|[^\s,;&}\])"']+)"""
# `name=value`, `name: value` and `"name": "value"`, also if the text is quoted once more; then `--name value`.
_PAIR = re.compile(r"""(?P<name>[A-Za-z_][\w.-]*)(?P<between>\\*["']?\s*[=:]\s*\\*)""" + _VALUE)
_OPTION = re.compile(r"(?P<name>--[A-Za-z][\w-]*)(?P<between>\s+)(?!-)" + _VALUE)
_USER_AND_PASSWORD = re.compile(r"""(?<![\w/@])[^\s:/@"'=]+:[^\s/@"']+@(?=[\w\[])""")
# A URL is matched before a path, so that the path on its host stays. A path inside a longer text ends at a space.
_END = r"""[^\s"'`,;:()\[\]{}<>|]*"""
_URL_OR_PATH = re.compile(
    r"""(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<address>[^\s"'`,;)\]}]*)"""
    rf"""|(?P<path>(?<![\w./~])(?:/(?!/)|~[\w.-]*/|(?:\.\./)+){_END}|\b[A-Za-z]:[\\/]{_END})"""
)


def is_secret_name(name: str) -> bool:
    """Whether an argument, a variable or a key of this name holds a secret, such as `hub_token` or `WANDB_API_KEY`."""
    words = [word.lower() for word in _WORD.findall(name)]
    joined = "".join(words)
    if words and words[-1] in _SECRET_ENDS:
        return True
    return any(part in joined for part in _SECRET_PARTS) or _SECRET_LISTS.search(joined) is not None


def secret_values(settings: Any, name: str = "") -> set[str]:
    """The texts in nested settings that stand under a secret name; `name` is the name of `settings` itself."""
    if isinstance(settings, Mapping):
        inner = name if is_secret_name(name) else None
        return {text for key, item in settings.items() for text in secret_values(item, inner or str(key))}
    if isinstance(settings, (list, tuple, set, frozenset)):
        return {text for item in settings for text in secret_values(item, name)}
    is_found = isinstance(settings, str) and len(settings) >= _SHORTEST_SECRET and is_secret_name(name)
    return {settings} if is_found else set()


def redact(value: Any, name: str = "", secrets: Iterable[str] = ()) -> Any:
    """
    A copy of `value` without secrets and local paths.

    Args:
        value: a text, a path, or nested dictionaries, lists and tuples of them. Other objects stay as they are.
        name: the name of the setting. Each text and integer under a secret name becomes `"<redacted>"`.
        secrets: further texts to remove wherever they occur.
    """
    return _redact(value, name, _with_environment(secrets))


def _redact(value: Any, name: str, secrets: tuple[str, ...]) -> Any:
    is_secret = is_secret_name(name)
    if isinstance(value, Mapping):
        return {
            _redact_text(key, secrets) if isinstance(key, str) else key: _redact(
                item, name if is_secret else str(key), secrets
            )
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_redact(item, name, secrets) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, Enum):  # some of them are texts too
        return value
    if is_secret and isinstance(value, (str, bytes, int, PurePath)) and not isinstance(value, bool):
        return REDACTED if value != "" else value
    return _redact_text(str(value), secrets) if isinstance(value, (str, PurePath)) else value


def redact_text(text: str, secrets: Iterable[str] = ()) -> str:
    """
    `text` without secrets. A path that does not lie in the working directory becomes its last component.

    Removed are `secrets`, the values of environment variables with secret names, credentials and queries of URLs, the
    value behind a secret name (`token=...`), and texts that look like an access token.
    """
    return _redact_text(text, _with_environment(secrets))


def _redact_text(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    if text.lstrip()[:1] in ("{", "["):
        try:
            return json.dumps(_redact(json.loads(text), "", secrets), ensure_ascii=False)
        except (ValueError, RecursionError):
            pass
    if _leaves_working_directory(text):
        text = _last_component(text)
    text = _BEARER.sub(rf"\1 {REDACTED}", text)
    text = _PAIR.sub(_redact_pair, text)
    text = _OPTION.sub(_redact_pair, text)
    text = _URL_OR_PATH.sub(_redact_place, text)
    text = _USER_AND_PASSWORD.sub(f"{REDACTED}@", text)
    return _TOKEN.sub(REDACTED, text)


def redact_command(arguments: Sequence[str], secrets: Iterable[str] = ()) -> str:
    """A command line without secrets and local paths, quoted for a shell."""
    secrets = tuple(secrets)
    shown, is_secret, needs_value = [], False, False
    for argument in arguments:
        if argument.startswith("-") and not needs_value:
            name, equals, value = argument.partition("=")
            is_secret = is_secret_name(name)
            needs_value = is_secret and not equals
            shown.append(f"{name}={redact(value, name, secrets)}" if equals else redact_text(argument, secrets))
        else:
            needs_value = False
            shown.append(REDACTED if is_secret else redact_text(argument, secrets))
    return shlex.join(shown)


def command_secrets(arguments: Sequence[str]) -> set[str]:
    """The values of a command line that stand behind a secret name."""
    found = set()
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if argument.startswith("-") and is_secret_name(name):
            found.add(value if equals else following)
    return {value for value in found if len(value) >= _SHORTEST_SECRET}


def _with_environment(secrets: Iterable[str]) -> tuple[str, ...]:
    """These secrets and those of the environment, the longest first: one may be a part of another."""
    environment = {
        value for name, value in os.environ.items() if len(value) >= _SHORTEST_SECRET and is_secret_name(name)
    }
    return tuple(sorted({*secrets, *environment}, key=len, reverse=True))


def _redact_pair(match: re.Match[str]) -> str:
    return f"{match['name']}{match['between']}{REDACTED}" if is_secret_name(match["name"]) else match[0]


def _redact_place(match: re.Match[str]) -> str:
    scheme, address = match["scheme"], match["address"]
    if scheme is None:
        return _last_component(match["path"])
    if scheme.lower() == "file":
        return _last_component(address)
    host = re.split(r"[/?#]", address, maxsplit=1)[0]
    # A password may hold `/`, `?` or `#`, though a URL should not be written so. The host then seems to end inside it.
    if "@" in host or ("@" in address and re.search(r":(?!\d*$)", host)):
        address = f"{REDACTED}@{address.rpartition('@')[2]}"
    place = re.split(r"[?#]", address, maxsplit=1)[0]
    return f"{scheme}://{place}" if place == address else f"{scheme}://{place}{address[len(place)]}{REDACTED}"


def _leaves_working_directory(path: str) -> bool:
    is_windows = re.match(r"[A-Za-z]:[\\/]|\\\\", path) is not None
    return is_windows or path.startswith(("/", "~")) or os.path.normpath(path).split(os.sep)[0] == os.pardir


def _last_component(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path


__all__ = ["REDACTED", "command_secrets", "is_secret_name", "redact", "redact_command", "redact_text", "secret_values"]
