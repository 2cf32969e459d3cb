"""Connection to MLflow: the server or file, and a SQLite database that is created completely or not at all."""

import logging
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from ddpm.runs import storage
from ddpm.utils import files
from ddpm.utils.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

SQLITE = "sqlite:///"
HALF_MADE = re.compile(r"already exists|duplicate column|no such (table|column|index)")
"""SQLite's message when MLflow opens a database whose creation was interrupted."""
USER_INFO = re.compile(r"//[^/\s@]*@")
REFUSED = ("BAD_REQUEST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes for a value that it will never accept."""
PERMANENT = (*REFUSED, "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED", "UNAUTHENTICATED")
"""MLflow's codes for a call that is useless to repeat."""


class MlflowError(UserError):
    """A call to MLflow failed; one line, without a password."""

    exit_code = 1

    def __init__(self, line: str, is_temporary: bool = False) -> None:
        super().__init__(line)
        self.is_temporary = is_temporary
        """Whether the same call may succeed later."""


class Refused(MlflowError):
    """MLflow will never accept a value."""


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file in the working folder, which `mlflow ui` shows there.

    A SQLite file's path is made absolute, since the process that tracks may run in another folder.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    return SQLITE + storage.absolute(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else uri


class Connection:
    """MLflow at `uri`, for one thread. A SQLite database that does not exist is created.

    Args:
        accepted: called after each call that succeeded.

    Attributes:
        client: an MlflowClient, whose methods are called by `connection(client.get_run, run_id)`.
    """

    def __init__(self, uri: str, accepted: Callable[[], object] = lambda: None) -> None:
        self.uri = uri
        self._accepted = accepted
        self.client = self._call(_connect, uri)  # asks no server, so MLflow has accepted nothing yet

    def __call__(self, call: Callable[..., T], *args: Any, **named: Any) -> T:
        """The result of `call`.

        Raises:
            Refused: MLflow will never accept an argument.
            MlflowError: any other failure.
        """
        result = self._call(call, *args, **named)
        self._accepted()
        return result

    def _call(self, call: Callable[..., T], *args: Any, **named: Any) -> T:
        try:
            return call(*args, **named)
        except MlflowError:
            raise
        except Exception as error:
            code = getattr(error, "error_code", None)  # of an MlflowException
            is_refused = code in REFUSED or _http_status(error, otherwise=0) == 400
            kind = Refused if is_refused else MlflowError
            raise kind(reason(error, self.uri), _is_temporary(error)) from None


@contextmanager
def opened() -> Iterator[Connection]:
    """A context with a connection, in which MLflow's own functions use the same server; errors become UserErrors."""
    uri = tracking_uri()
    os.environ["MLFLOW_TRACKING_URI"] = uri
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    from mlflow.exceptions import MlflowException

    try:
        yield Connection(uri)
    except MlflowError as error:
        raise UserError(f"MLflow at {without_password(uri)}: {error}") from None
    except (MlflowException, OSError) as error:
        raise UserError(f"MLflow at {without_password(uri)}: {reason(error, uri)}") from None


def without_password(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if separator else uri


def reason(error: BaseException | None, uri: str) -> str:
    """`error` in one line, without the password that MLflow's messages quote with `uri`."""
    text = str(error).replace(uri, without_password(uri))
    text = text.partition("[SQL:")[0]  # the queries of SQLAlchemy's errors
    return f"{type(error).__name__}: {USER_INFO.sub('//', ' '.join(text.split()))[:400]}"


def database_file(uri: str) -> Path | None:
    """The SQLite file that `uri` names; None if it names something else."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) and "?" not in uri else None


def _connect(uri: str) -> Any:
    """An MlflowClient of MLflow at `uri`."""
    # One quick attempt per call: the caller tries again. URLs may hold a password.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # A pooled connection would go on writing to a SQLite file that has been deleted.
    os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    from mlflow import MlflowClient  # takes seconds
    from sqlalchemy.exc import OperationalError

    for name, level in {"mlflow": "WARNING", "alembic": "WARNING", "mlflow.store.db": "CRITICAL"}.items():
        logging.getLogger(name).setLevel(level)  # of each failed query the last logs a traceback, 60 lines
    database = database_file(uri)
    if database is not None and not database.exists():
        _create_database(database)
    try:
        return MlflowClient(uri)
    except Exception as error:
        trace = None if database is None else _half_made(database, error)
        if trace is not None:
            raise MlflowError(
                f"{database} is incomplete: MLflow was stopped while it created or upgraded its tables ({trace}). "
                "Move this file away; a new one is then created, and `ddpm sync RUN` sends a run to it"
            ) from None
        if isinstance(error, OperationalError) and "unable to open" not in str(error):
            # Such as a locked database: an OSError is temporary, as after the first connection.
            raise OSError(str(error)) from None
        raise


def _is_temporary(error: BaseException) -> bool:
    code = getattr(error, "error_code", None)  # of an MlflowException
    if code is not None:
        return code not in PERMANENT
    status = _http_status(error, otherwise=500)
    return isinstance(error, OSError) and (status >= 500 or status in (408, 429))


def _http_status(error: BaseException, otherwise: int) -> int:
    """The HTTP status in the error of a file transfer (an OSError of requests holds the response)."""
    return getattr(getattr(error, "response", None), "status_code", otherwise)


def _create_database(database: Path) -> None:
    """Create MLflow's tables in a temporary file, which is named `database` once it is complete.

    MLflow's migrations are not atomic: after a kill during one, MLflow cannot open the file any more (3.17).
    """
    from mlflow import MlflowClient

    folder = files.temporary(database)
    try:
        folder.mkdir(parents=True)
        new = folder / database.name
        MlflowClient(f"{SQLITE}{new}")
        with suppress(FileExistsError):  # another process was faster, and may have written to its file
            os.link(new, database)
    except OSError as error:  # no hard links, or no permission: MLflow creates it, or raises
        logger.info("%s is not created in a temporary file: %s", database, error)
    else:
        files.sweep(database.parent)  # leftovers of killed processes
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _half_made(database: Path, error: Exception) -> str | None:
    """Sign of an interrupted migration: a leftover table, or SQLite's message; None: there is none."""
    read_only = f"{database.absolute().as_uri()}?mode=ro"
    with suppress(sqlite3.Error), closing(sqlite3.connect(read_only, uri=True)) as opened:
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name GLOB '_alembic_tmp_*'"
        if left := opened.execute(query).fetchone():
            return f"table {left[0]} is left over"
    message = str(getattr(error, "orig", ""))  # SQLAlchemy's errors carry SQLite's
    return message if HALF_MADE.search(message) else None
