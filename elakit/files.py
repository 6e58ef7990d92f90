"""Functions that write files and folders completely or not at all, and that read text files with clear errors."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from elakit.errors import ElakitError, OutputError, clause

_log = logging.getLogger(__name__)

# Size of the largest text file that is read; elakit writes no larger one.
MAX_TEXT_BYTES = 256 * 2**20

_ATTEMPTS = 100  # largest number of renames while other processes write the same folder
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # another process has written the folder meanwhile


def write_file(path: str | Path, content: bytes, *, sync: bool = True) -> Path:
    """Write a file completely or not at all; an existing file is replaced.

    The content is first written to a temporary file with a unique name in the same folder. This file is then renamed to
    `path`. A process that is killed leaves the old file, and at most one hidden ``.part`` file, which does not affect
    later calls.

    Parameters
    ----------
    path : str or pathlib.Path
        File to write; its folder must exist.
    content : bytes
    sync : bool
        Whether to wait until the content is on the disk. False is faster, but a power failure may then leave an
        incomplete file. Use False where hundreds of files are written.

    Returns
    -------
    pathlib.Path
        The path that was written.

    Raises
    ------
    OutputError
        The file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_file(Path(folder, "notes.txt"), b"42")
    ...     path.read_bytes(), [file.name for file in Path(folder).iterdir()]
    (b'42', ['notes.txt'])
    """
    target = Path(path)
    part = _sibling(target, "part")
    try:
        with part.open("xb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())  # a power failure may otherwise leave the new name without the content
        os.replace(part, target)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise unwritable(target, error) from error
    finally:
        with suppress(OSError, ValueError):
            part.unlink(missing_ok=True)
    return target


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Context that yields a temporary path to write a file to, and renames the file to `path` at the end.

    Use this context for libraries that write a file themselves, such as NumPy. If the body of the ``with`` statement
    raises an error, nothing changes at `path`.

    Parameters
    ----------
    path : str or pathlib.Path
        File to write; its folder must exist. An existing file is replaced.

    Yields
    ------
    pathlib.Path
        Path in a temporary folder. Its file name equals that of `path`, because some formats store the name in the
        file.

    Raises
    ------
    OutputError
        The file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replace_file(Path(folder, "maps.npz")) as part:
    ...         np.savez(part, maps=np.zeros(3))
    ...     [file.name for file in Path(folder).iterdir()]
    ['maps.npz']
    """
    target = Path(path)
    folder = _sibling(target, "part")
    try:
        folder.mkdir()
        part = folder / target.name
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    except ElakitError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise unwritable(target, error) from error
    finally:
        with suppress(OSError, ValueError):
            shutil.rmtree(folder, ignore_errors=True)


def write_text(path: str | Path, text: str) -> Path:
    r"""Write a text file in UTF-8, completely or not at all; an existing file is replaced.

    Characters that UTF-8 cannot represent (lone surrogates) are written as escapes such as ``\udcff``. Python creates
    such characters from invalid bytes, for example in the arguments of a command line.

    Parameters
    ----------
    path : str or pathlib.Path
        File to write; its folder must exist.
    text : str

    Returns
    -------
    pathlib.Path
        The path that was written.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    return write_file(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> Path:
    """Write a value as a JSON file, completely or not at all; an existing file is replaced.

    Parameters
    ----------
    path : str or pathlib.Path
        File to write; its folder must exist.
    value : object
        Dictionaries, lists, strings, numbers, booleans and None. NumPy scalars are converted to Python values, and
        paths to strings.
    indent : int, optional
        Number of spaces per level of indentation. With None, the file has a single line.

    Returns
    -------
    pathlib.Path
        The path that was written.

    Raises
    ------
    OutputError
        The file cannot be written.
    TypeError
        The value contains an object of another type.
    """
    return write_text(path, json.dumps(value, indent=indent, default=_plain))


def _plain(value: Any) -> Any:
    """Convert a NumPy scalar or a path to a value that JSON can represent."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return value.item()
    raise TypeError(
        f"A value of type {type(value).__name__} cannot be written as JSON: {_shown(repr(value))}. Convert it to "
        "numbers, text, lists and dictionaries."
    )


def read_text(path: str | Path, limit: int = MAX_TEXT_BYTES) -> str:
    """Read a text file in UTF-8, without the byte-order mark that some editors write.

    Parameters
    ----------
    path : str or pathlib.Path
    limit : int
        Largest size of the file in bytes.

    Returns
    -------
    str

    Raises
    ------
    OutputError
        The file does not exist, cannot be read, is larger than `limit`, or is not text in UTF-8.

    Examples
    --------
    >>> read_text("no-such-file.txt")
    Traceback (most recent call last):
    ...
    elakit.errors.OutputError: no-such-file.txt cannot be read: No such file or directory. Check the path...
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        if size > limit:
            raise OutputError(f"{file} is too large: {size:,} bytes; at most {limit:,} are allowed. Give another file.")
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OutputError(
            f"{file} is not text in UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
    except ElakitError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise OutputError(f"{file} cannot be read: {_reason(error)}. Check the path and its permissions.") from error


def read_json(path: str | Path, limit: int = MAX_TEXT_BYTES) -> Any:
    """Read the value of a JSON file.

    Parameters
    ----------
    path : str or pathlib.Path
    limit : int
        Largest size of the file in bytes.

    Returns
    -------
    object

    Raises
    ------
    OutputError
        The file cannot be read (see `read_text`), or is not valid JSON.
    """
    text = read_text(path, limit)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise OutputError(
            f"{path} is damaged: it is not valid JSON ({reason}). Restore the file, or write it again."
        ) from error


@contextmanager
def replace_folder(folder: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Context that yields a temporary folder to fill, and renames the folder to its final name at the end.

    After the body of the ``with`` statement, an existing folder is first renamed to a hidden name. Then the new folder
    gets the final name, and the old folder is deleted. If renaming fails, the old folder is restored. Temporary folders
    lie next to the final folder. Their hidden names are unique, so an interrupted call never blocks a later call.

    Parameters
    ----------
    folder : str or pathlib.Path
        Final folder; missing parents are created.
    overwrite : bool
        Whether an existing folder is replaced, even if it was created while the body ran. If False, an existing folder
        with content raises an error.

    Yields
    ------
    pathlib.Path
        Empty temporary folder to fill.

    Raises
    ------
    OutputError
        The folder cannot be written or renamed. Also raised if `overwrite` is False and the final folder already exists
        with content.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     with replace_folder(Path(parent, "run")) as new:
    ...         _ = Path(new, "note.txt").write_text("complete")
    ...     sorted(file.name for file in Path(parent).iterdir()), Path(parent, "run", "note.txt").read_text()
    (['run'], 'complete')
    """
    target = Path(folder)
    with suppress(OSError, ValueError, RuntimeError):
        target = Path(os.path.realpath(target))  # the folder behind a symbolic link is replaced, not the link
    part = _sibling(target, "part")
    aside: list[Path] = []
    try:
        part.mkdir(parents=True)
        yield part
        if overwrite:
            _swap(part, target, aside)
        else:
            _rename(part, target)
    except ElakitError:
        raise
    except (OSError, ValueError) as error:
        raise unwritable(Path(folder), error) from error
    finally:
        with suppress(OSError, ValueError):
            shutil.rmtree(part, ignore_errors=True)
        for old in aside:
            shutil.rmtree(old, ignore_errors=True)
            if old.exists():
                _log.warning("The replaced folder could not be deleted completely: %s", old)


def _swap(new: Path, target: Path, aside: list[Path]) -> None:
    """Rename the folder `new` to `target`; a folder that already exists at `target` first gets a hidden name.

    The hidden path is appended to `aside`, so that the caller can delete the old folder. If renaming `new` fails, the
    old folder gets its name back.
    """
    try:
        for attempt in range(_ATTEMPTS):
            if os.path.lexists(target):
                old = _sibling(target, "old")
                with suppress(FileNotFoundError):  # another process was faster
                    os.rename(target, old)
                    aside.append(old)
            try:
                os.rename(new, target)
                return
            except OSError as error:
                if error.errno not in _TAKEN or attempt == _ATTEMPTS - 1:
                    raise
    except BaseException:
        # Also after an interrupt between the two renames. A folder that another writer put there meanwhile stays.
        if aside and not os.path.lexists(target):
            with suppress(OSError):
                os.rename(aside[-1], target)
                aside.pop()
        raise


def _rename(new: Path, target: Path) -> None:
    """Rename the folder `new` to `target`; raise OutputError if `target` exists and is not an empty folder."""
    try:
        os.rename(new, target)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        raise OutputError(
            f"{_shown(target)} already exists, and is not replaced. Choose another path, or move the existing file or "
            "folder."
        ) from error


def leftovers(folder: str | Path) -> list[Path]:
    """Find earlier versions of a folder that interrupted calls of `replace_folder` have left in hidden folders.

    Parameters
    ----------
    folder : str or pathlib.Path
        Folder that the interrupted calls were to replace.

    Returns
    -------
    list of pathlib.Path
        Hidden folders next to `folder`; an empty list if there are none. Each hidden folder contains one earlier
        version of `folder`. The version is incomplete if the call was interrupted while it deleted the version.
    """
    target = Path(folder)
    start = f".{target.name[:_NAME]}."
    try:
        names = os.listdir(target.parent)
    except (OSError, ValueError):
        return []
    return sorted(target.parent / name for name in names if name.startswith(start) and name.endswith(".old"))


def check_path(path: str | Path, what: str = "report", example: str = "report.html") -> Path:
    """Check, before any work is done, that a file can be written to a path.

    Parameters
    ----------
    path : str or pathlib.Path
        File that is to be written later.
    what : str
        Description of the file's content, for the message.
    example : str
        File name that the message suggests if the path is empty or is an existing folder.

    Returns
    -------
    pathlib.Path
        Absolute path.

    Raises
    ------
    OutputError
        The path is empty, is too long, or is an existing folder. Also raised if the folder that would contain the file
        does not exist or is not writable.

    Examples
    --------
    >>> check_path("no-such-folder/report.html")
    Traceback (most recent call last):
    ...
    elakit.errors.OutputError: The report cannot be written to no-such-folder/report.html: there is no folder ...
    """
    if not str(path):
        raise OutputError(f"The path of the {what} is empty. Give the name of a file, such as {example}.")
    wrong = f"The {what} cannot be written to {_shown(path)}:"
    try:
        target = Path(path).expanduser().absolute()
        if target.is_dir():
            raise OutputError(
                f"{wrong} it is a folder. Give the name of a file, such as {_shown(Path(path, example))}."
            )
        with suppress(FileNotFoundError):
            target.lstat()  # raises for names that the file system does not accept
        if not target.parent.is_dir():
            raise OutputError(
                f"{wrong} there is no folder {_shown(target.parent)}. Create it (mkdir -p) or choose one that exists."
            )
    except ElakitError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise OutputError(f"{wrong} {_reason(error)}. Choose another path.") from error
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"{wrong} the folder {_shown(target.parent)} is not writable. Choose another folder.")
    return target


# Characters of the final name that a temporary name repeats: the rest must fit the file system's limit of 255 bytes.
_NAME = 40


def _sibling(target: Path, suffix: str) -> Path:
    """Unique hidden path in the folder that contains `target`; its name ends with a period and `suffix`."""
    return target.parent / f".{target.name[:_NAME]}.{uuid.uuid4().hex[:12]}.{suffix}"


def unwritable(path: Path, error: Exception) -> OutputError:
    """Error for a file or folder that cannot be written, with the reason that the file system gave."""
    return OutputError(
        f"{_shown(path)} cannot be written: {_reason(error)}. Free some space, or choose a folder you may write to."
    )


def _reason(error: BaseException) -> str:
    """Short reason why a file operation failed, as a part of a sentence."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return "the name is too long for the file system"
    return clause((isinstance(error, OSError) and error.strerror) or error)


def _shown(path: str | Path, length: int = 120) -> str:
    """Path as text for a message, shortened and without characters that a terminal cannot show."""
    text = str(path).encode("utf-8", errors="backslashreplace").decode("utf-8")
    return text if len(text) <= length else f"{text[: length - 1]}…"
