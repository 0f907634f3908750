"""The address of an OpenAI-compatible endpoint: one rule for every verb that takes one.

An address is written as ``URL[#MODEL]``. Its path is taken as it is (``https://api.openai.com/v1``,
``https://generativelanguage.googleapis.com/v1beta/openai``, ``https://host/api/paas/v4``), as OpenAI's own clients
do. Where there is none, ``/v1`` is meant, which is where vLLM, TGI, Ollama, LM Studio and llama-server answer. A path
that goes on to one of the API's own (``/chat/completions``) is cut before it.
"""

from __future__ import annotations

from urllib.parse import unquote, urlsplit, urlunsplit

from bitladder.errors import UsageError

API = "/v1"
"""The base path of an address that names none."""
_RESOURCES = ("/chat/completions", "/completions", "/embeddings", "/models")


def is_address(text: str) -> bool:
    """Whether a text is meant as an address, and not as a level or a file."""
    return "://" in text


def api_base(url: str) -> str:
    """The base URL that ``/chat/completions`` and ``/models`` are appended to, without a slash at its end.

    Raises:
        UsageError: not an HTTP address; or it holds a user, a password or a query, where keys hide.
    """
    try:
        parts = urlsplit(url.strip())
        found, _ = parts.hostname, parts.port
    except ValueError:
        found = None
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not found or any(c.isspace() or ord(c) < 32 for c in url.strip()):
        raise UsageError(f"'{_shown(url)}' is no address of an engine.", do="Write it like http://host:port/v1#model.")
    if parts.username or parts.password or parts.query:
        raise UsageError(
            "The address of an engine must hold neither a user, a password nor a query.",
            means="Addresses are printed and stored; keys must not be.",
            do="Give the key by an environment variable (--key-env) or a file (--key-file).",
        )
    path = parts.path.rstrip("/")
    for resource in _RESOURCES:
        if path.endswith(resource):
            path = path.removesuffix(resource).rstrip("/")
            break
    return urlunsplit((parts.scheme, parts.netloc, path or API, "", ""))


def split_address(address: str) -> tuple[str, str]:
    """Base URL and model of ``URL[#MODEL]``; the model is empty where none is named.

    Raises:
        UsageError: as `api_base`.
    """
    url, _, model = address.strip().partition("#")
    return api_base(url), unquote(model)


def _shown(url: str) -> str:
    """An address for a message, without what may be a password or a key."""
    rest = url.split("?", 1)[0]
    scheme, mark, place = rest.partition("://")
    return f"{scheme}{mark}{place.rpartition('@')[2]}" if mark else rest
