"""Addresses that are told of incidents: looked at where they are given, and shown without what is secret in them."""

from __future__ import annotations

import base64
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from .errors import ConfigError

__all__ = ["checked_address", "host_of", "post"]


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


def post(url: str, body: bytes, *, timeout: float) -> None:
    """Send JSON to an address; a name and password in it go into the header for them.

    Args:
        url: as `checked_address` returned it.
        body: JSON.
        timeout: seconds.

    Raises:
        OSError: nobody answered, or with a refusal. It holds no connection, however long it is kept.
    """
    parts = urlsplit(url)
    headers = {"Content-Type": "application/json"}
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    try:
        with urlopen(Request(url, body, headers, method="POST"), timeout=timeout):
            pass
    except HTTPError as refusal:
        refusal.close()
        raise
