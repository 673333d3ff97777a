"""The address of Redis with all that a client needs to log in."""

from __future__ import annotations

from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from onstream.settings.sections.run import RedisSettings

TLS = {"tls_ca": "ssl_ca_certs", "tls_cert": "ssl_certfile", "tls_key": "ssl_keyfile"}
"""The settings that go into the address's query, by the names that redis-py knows them by."""


def address(redis: RedisSettings) -> str | None:
    """`redis.url` with `redis.password` and the files of TLS; None where it is unset.

    >>> address(RedisSettings(url="rediss://host:6379/0", password="a b", tls_ca="/ca.pem"))
    'rediss://:a%20b@host:6379/0?ssl_ca_certs=%2Fca.pem'
    """
    if redis.url is None:
        return None
    parts = urlsplit(redis.url.get_secret_value())
    place = parts.netloc
    if redis.password is not None:
        user, _, host = place.rpartition("@")
        place = f"{user}:{quote(redis.password.get_secret_value(), safe='')}@{host}"
    files = {
        known: str(path)
        for name, known in TLS.items()
        if (path := getattr(redis, name)) is not None
    }
    query = urlencode([*parse_qsl(parts.query), *files.items()])
    # urlunsplit would take the slashes from unix:///path
    return f"{parts.scheme}://{place}{parts.path}{'?' if query else ''}{query}"
