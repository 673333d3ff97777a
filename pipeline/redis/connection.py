"""One worker's connections to Redis: login, checks, calls that outlive an outage.

The library's own retries are off: a call that is repeated blindly may write twice. What is repeated
here is a read, a script that may run twice, or a command that may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import structlog
import tenacity
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ConnectionError,
    InvalidResponse,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.redis.keys import GROUP, Keys
from onstream.pipeline.redis.scripts import Script
from onstream.settings.stages import StreamName

T = TypeVar("T")
log = structlog.get_logger(__name__)


class WritesRefused(ConnectionError):
    """Redis cannot write its data to its disk, which is full as a rule, and takes no more."""


OUTAGE = (ConnectionError, TimeoutError, ReadOnlyError)
"""What a call raises while Redis is away, loading its data, or failing over."""
READ_MARGIN_S = 10.0
"""How late a blocking read may be before its connection counts as dead."""
CALL_TIMEOUT_S = 15.0
READ_BYTES = 1 << 18  # the default of 32 KB halves the throughput of 64 KB records
OLDEST = (6, 2)


class Connection:
    """Two clients of one Redis: one blocks, `client` does the rest.

    The one that blocks belongs to the main thread; `client` may be used from any. Calls outlive an
    outage of `patience_s` seconds.

    Raises:
        UserError: `url` is not one of a Redis.
    """

    def __init__(
        self, url: str, run: str, *, consumer: str, block_s: float, connect_timeout_s: float
    ) -> None:
        self.run = run
        self.consumer = consumer
        self.keys = Keys(run)
        self.patience_s = connect_timeout_s
        self.url = url
        self._where = shown(url)
        self.client = self._client(url, CALL_TIMEOUT_S)
        self._reader = self._client(url, block_s + READ_MARGIN_S)
        self._reader_id: int | None = None
        self._server: str | None = None  # the process that answered last

    def _client(self, url: str, timeout_s: float) -> Any:
        # Any: redis-py types every reply as sync-or-async, which helps nobody
        try:
            return Redis.from_url(
                url,
                protocol=2,
                socket_timeout=timeout_s,
                socket_connect_timeout=min(5.0, self.patience_s),
                socket_read_size=READ_BYTES,
                retry=Retry(NoBackoff(), 0),
                client_name=f"onstream:{self.consumer}"[:64].replace(" ", "-"),
            )
        except ValueError as error:
            raise UserError(
                f"redis.url = {self._where}", expected=str(error), next_step="Correct redis.url."
            ) from error

    def close(self) -> None:
        """Close both clients."""
        self._reader.close()
        self.client.close()

    def check(self) -> None:
        """Check the server as `check_server` does, and create the streams' groups.

        Raises:
            UserError: as `check_server`.
        """
        self.check_server()
        self.create_groups()

    def check_server(self) -> None:
        """Reach the server, and refuse one that cannot carry a run. Changes nothing.

        Raises:
            UserError: Redis does not answer, wants another password, is too old, or may evict
                keys; or the server is no Redis.
        """
        try:
            self.patiently(self.client.ping)
            info = self.client.info()
        except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
            raise self._locked(error) from error
        except ResponseError as error:
            if not str(error).startswith(("NOAUTH", "WRONGPASS", "DENIED")):
                raise
            raise self._locked(error) from error
        except OUTAGE as error:
            raise self._unreachable(error) from error
        except InvalidResponse as error:
            raise UserError(
                f"what answers at {self._where} is no Redis ({error})",
                expected="a server that talks the protocol of Redis",
                next_step="Correct the host and the port of redis.url.",
            ) from error
        self._refuse_unfit(info)
        self._server = info.get("run_id")

    def server_changed(self) -> bool:
        """Whether another server process answers than at the last call of this or of `check`."""
        before = self._server
        self._server = self.ask("INFO", "server").get("run_id")
        return self._server != before

    def _locked(self, error: Exception) -> UserError:
        return UserError(
            f"Redis at {self._where} refused this login ({error})",
            expected="a user and password that Redis accepts",
            next_step="Put them into redis.url: redis://user:password@host:port/0.",
        )

    def _unreachable(self, error: Exception) -> UserError:
        return UserError(
            f"no answer from Redis at {self._where} within {self.patience_s:g} s ({error})",
            expected="a running Redis",
            next_step="Start it, correct redis.url, or unset redis.url so that `onstream up` "
            "starts its own.",
            exit=Exit.UNREACHABLE,
        )

    def _refuse_unfit(self, info: dict[str, Any]) -> None:
        version = str(info["redis_version"])
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            raise UserError(
                f"Redis {version} at {self._where}",
                expected="Redis 6.2 or newer",
                next_step="Use a newer server.",
            )
        policy = info["maxmemory_policy"]
        if policy != "noeviction":
            raise UserError(
                f"maxmemory-policy {policy} of the Redis at {self._where}, which may delete a "
                "run's records",
                expected="noeviction",
                next_step="Run `redis-cli config set maxmemory-policy noeviction`, or use another "
                "server.",
            )

    def has_room(self) -> bool:
        """Whether Redis has memory for what is written next."""
        memory = self.ask("INFO", "memory")
        return not 0 < memory["maxmemory"] <= memory["used_memory"]

    def create_groups(self) -> None:
        """Create the consumer group of every stream, at its beginning, where it is missing."""
        for stage, stream in self.keys.streams.items():
            try:
                self.ask("XGROUP", "CREATE", stream, GROUP, "0", "MKSTREAM")
            except OutOfMemoryError as error:
                if not self._has_group(stage):  # a full Redis does, where the group exists
                    raise self._full(error) from error
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    def _has_group(self, stage: StreamName) -> bool:
        return bool(self.ask("EXISTS", self.keys.streams[stage])) and bool(
            self.ask("XINFO", "GROUPS", self.keys.streams[stage])
        )

    def _full(self, error: Exception) -> UserError:
        return UserError(
            f"the Redis at {self._where} is full ({error})",
            expected="memory for a new run",
            next_step="Delete what it does not need, raise its maxmemory (redis.max_memory for the "
            "one of `onstream up`), or use another.",
        )

    def ask(self, *command: Any, **parsing: Any) -> Any:
        """The reply to a command that may be repeated; it is, through an outage of `patience_s`.

        Where Redis has lost the streams' groups, they are created again first.
        """
        try:
            return self.patiently(lambda: self._execute(*command, **parsing))
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            log.warning("streams or their groups are gone; creating them again", error=str(error))
            self.create_groups()
            return self.patiently(lambda: self._execute(*command, **parsing))

    def _execute(self, *command: Any, **parsing: Any) -> Any:
        try:
            return self.client.execute_command(*command, **parsing)
        except ResponseError as error:
            if "-READONLY" in str(error):  # Redis 6.2 wraps it in an error of the script
                raise ReadOnlyError(str(error)) from error
            if "MISCONF" in str(error):
                raise WritesRefused(str(error)) from error
            raise

    def run_script(self, script: Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """The reply of `script`, repeated through an outage: each script may run twice.

        Raises:
            redis.OutOfMemoryError: Redis is full and refused the script's first write, so it
                changed nothing.
        """
        try:
            return self._evaluate(script, keys, args)
        except ResponseError as error:
            # Redis 6.2 wraps it in an error of the script
            if "OOM command not allowed" in str(error):
                raise OutOfMemoryError(str(error)) from error
            raise

    def _evaluate(self, script: Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        try:
            return self.ask("EVALSHA", script.sha, len(keys), *keys, *args)
        except NoScriptError:  # a restarted server has forgotten its scripts
            return self.ask("EVAL", script.source, len(keys), *keys, *args)

    def patiently(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except (AuthenticationError, AuthorizationError):
            raise
        except OUTAGE as error:
            log.warning(
                "redis does not answer",
                redis=self._where,
                error=str(error),
                patience_s=self.patience_s,
            )
            return self._retrying()(lambda: self._reconnected(call))

    def _reconnected(self, call: Callable[[], T]) -> T:
        """The reply to `call`.

        A server that takes no writes has become a replica. Its connections are closed, so that the
        next try connects to whatever server the address means by then.
        """
        try:
            return call()
        except ReadOnlyError:
            self.client.connection_pool.disconnect(inuse_connections=False)
            raise

    def _retrying(self) -> tenacity.Retrying:
        return tenacity.Retrying(
            stop=tenacity.stop_after_delay(self.patience_s),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=1.0),
            retry=tenacity.retry_if_exception(
                lambda error: (
                    isinstance(error, OUTAGE) and not isinstance(error, AuthenticationError)
                )
            ),
            reraise=True,
        )

    def block(self, *command: Any) -> Any:
        """The reply to a blocking read.

        It is not repeated: a reply that was lost may have handed out entries, which are pending
        with this worker and must be looked for.
        """
        try:
            if self._reader_id is None:
                self._reader_id = self._reader.client_id()
            return self._reader.execute_command(*command)
        except OUTAGE:
            self._reader_id = None
            self._reader.connection_pool.disconnect()
            raise

    def unblock(self) -> None:
        """End the blocking read that the main thread may be in.

        For another thread. Never from a signal handler, which may have interrupted the main thread
        while it uses `client`.
        """
        if (reader := self._reader_id) is not None:
            self.ask("CLIENT", "UNBLOCK", reader)

    def shut_down(self) -> None:
        """Have the server save its data and end."""
        self.client.shutdown()

    def server_time(self) -> float:
        """The server's clock, in seconds since the epoch."""
        seconds, micros = self.ask("TIME")
        return float(seconds) + float(micros) / 1e6


def shown(url: str) -> str:
    """`url` without its password."""
    parts = urlsplit(url)
    return url if parts.password is None else url.replace(f":{parts.password}@", ":***@")


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`items` in runs of up to `size`."""
    return (items[at : at + size] for at in range(0, len(items), size))
