"""Addresses that are told of incidents: looked at where they are given, and shown without what is secret in them."""

from __future__ import annotations

import base64
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from .errors import ConfigError

__all__ = ["checked_address", "host_of", "request_parts"]


def checked_address(url: str, *, where: str) -> str:
    """Return an http(s) address.

    Args:
        url: as it was given.
        where: who asks, for the error.

    Raises:
        ConfigError: it is none. The address itself is not shown: it may hold a password or a token.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
        host = parts.hostname
        if parts.scheme not in ("http", "https"):
            raise ValueError("it does not begin with http:// or https://")
        if not host:
            raise ValueError("it names no host")
        if not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError("it holds blanks, or characters that no address has")
    except ValueError as error:
        raise ConfigError(f"{where}: this is no http(s) address: {error}.") from None
    return url


def host_of(url: str) -> str:
    """Return what of an address may be shown."""
    return urlsplit(url).hostname or "an address"


def request_parts(url: str) -> tuple[str, dict[str, str]]:
    """Return the address without a name and password in it, and the headers that carry these."""
    parts = urlsplit(url)
    headers = {"Content-Type": "application/json"}
    if parts.username is None:
        return url, headers
    pair: Any = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])), headers
