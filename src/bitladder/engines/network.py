"""How endpoints are reached: proxies and certificates as the usual variables name them, in measuring and serving.

``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY``, in small letters too, as Python's own library reads
them; this machine itself is never asked through a proxy. ``SSL_CERT_FILE``, ``SSL_CERT_DIR``, ``REQUESTS_CA_BUNDLE``
and ``CURL_CA_BUNDLE`` name certificates; without them the system's are trusted, or certifi's where it has none.
"""

from __future__ import annotations

import base64
import functools
import ipaddress
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

from bitladder.errors import UsageError

_FILES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@dataclass(frozen=True)
class Proxy:
    """A proxy that speaks HTTP."""

    name: str
    port: int
    tls: bool
    """Whether it is itself spoken to in TLS."""
    authorization: str = field(default="", repr=False)
    """Value of ``Proxy-Authorization``; empty where it wants none."""
    url: str = field(default="", repr=False)

    @property
    def place(self) -> str:
        """Host and port, for messages."""
        return f"{self.name}:{self.port}"


def proxy_for(url: str) -> Proxy | None:
    """The proxy that the environment names for an address; None: it is asked directly.

    Raises:
        UsageError: what it names is no HTTP proxy.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host):
        return None
    proxies = getproxies_environment()
    found = proxies.get(parts.scheme) or proxies.get("all")
    if not found or proxy_bypass_environment(parts.netloc.rpartition("@")[2], proxies):
        return None
    return _read(found if "://" in found else f"http://{found}")


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _read(url: str) -> Proxy:
    try:
        parts = urlsplit(url)
        name, port = parts.hostname or "", parts.port
    except ValueError:
        parts, name, port = urlsplit(""), "", None
    if parts.scheme not in ("http", "https") or not name:
        raise UsageError(
            f"The proxy that the environment names is no HTTP proxy ('{parts.scheme or '?'}').",
            means="HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names something else, such as a SOCKS proxy.",
            do="Name an HTTP proxy (http://host:port), or leave the endpoint out with NO_PROXY.",
        )
    authorization = ""
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = f"Basic {base64.b64encode(pair.encode()).decode()}"
    tls = parts.scheme == "https"
    return Proxy(name, port or (443 if tls else 80), tls, authorization, url)


def tls_context() -> ssl.SSLContext:
    """What certificates are checked with.

    Raises:
        UsageError: the file or folder that a variable names cannot be read, or holds none.
    """
    named = next(((name, path) for name in _FILES if (path := os.environ.get(name))), None)
    return _context(*(named or ("", "")), os.environ.get("SSL_CERT_DIR", ""))


@functools.lru_cache(maxsize=4)
def _context(variable: str, path: str, folder: str) -> ssl.SSLContext:
    if not path:
        context = ssl.create_default_context()
        if not context.cert_store_stats()["x509_ca"] and not folder:
            import certifi

            context.load_verify_locations(certifi.where())
        return context
    try:
        is_folder = Path(path).is_dir()
        return ssl.create_default_context(
            cafile=None if is_folder else path, capath=path if is_folder else folder or None
        )
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(
            f"The certificates that {variable} names cannot be used: '{path}': {error.strerror or error}.",
            do="Name a file of certificates in PEM.",
        ) from None
