"""Files and folders are complete or absent, whatever fails while they are written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from elakit import files
from elakit.errors import OutputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def folder_with(path: Path, content: str) -> Path:
    with files.replace_folder(path) as new:
        (new / "content.txt").write_text(content)
    return path


def test_a_file_is_replaced_and_nothing_else_remains(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    files.write_file(path, b"old")
    files.write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["table.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    files.write_file(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"table\.json cannot be written: No space left on device"):
        files.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["table.json"]


def test_a_library_that_breaks_off_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "maps.npz"
    with files.replace_file(path) as part:
        assert part.name == path.name  # np.savez appends a suffix to other names
        part.write_bytes(b"old")
    with pytest.raises(TypeError), files.replace_file(path) as part:
        part.open("wb").write("half")  # bytes are wanted
    with pytest.raises(OutputError, match=r"maps\.npz cannot be written"), files.replace_file(path):
        pass  # nothing was written
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["maps.npz"]


def test_leftovers_of_a_killed_process_with_the_same_id_do_not_matter(tmp_path: Path) -> None:
    # containers start every process with the same id, so names that repeat with it would clash
    for number in range(2):
        (tmp_path / f".run.{os.getpid()}.tmp").mkdir(exist_ok=True)
        (tmp_path / f".run.{os.getpid()}.part").mkdir(exist_ok=True)
        folder_with(tmp_path / "run", str(number))
    assert (tmp_path / "run" / "content.txt").read_text() == "1"


def test_a_name_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    name = "x" * 255
    assert files.write_file(tmp_path / name, b"1").read_bytes() == b"1"
    folder_with(tmp_path / ("y" * 255), "2")
    assert names(tmp_path) == [name, "y" * 255]


@pytest.mark.parametrize("name", ["z" * 256, "a\0b"])
def test_names_that_cannot_exist_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError):
        files.check_path(tmp_path / name)
    with pytest.raises(OutputError):
        files.write_file(tmp_path / name, b"1")
    with pytest.raises(OutputError):
        files.read_text(tmp_path / name)
    with pytest.raises(OutputError):
        folder_with(tmp_path / name, "1")
    assert not names(tmp_path)


def test_a_folder_is_replaced_and_nothing_else_remains(tmp_path: Path) -> None:
    folder_with(tmp_path / "deep" / "run", "old")
    folder_with(tmp_path / "deep" / "run", "new")
    assert (tmp_path / "deep" / "run" / "content.txt").read_text() == "new"
    assert names(tmp_path / "deep") == ["run"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="already exists, and is not replaced"),
        files.replace_folder(tmp_path / "run", overwrite=False),
    ):
        folder_with(tmp_path / "run", "first")
    assert (tmp_path / "run" / "content.txt").read_text() == "first"
    assert names(tmp_path) == ["run"]


def test_an_error_in_the_body_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "run", "old")
    with pytest.raises(KeyboardInterrupt), files.replace_folder(folder) as new:  # noqa: PT012
        (new / "content.txt").write_text("half")
        raise KeyboardInterrupt
    assert (folder / "content.txt").read_text() == "old"
    assert names(tmp_path) == ["run"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path / "run", "old")
    rename, calls = os.rename, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OutputError, match="Input/output error"):
        folder_with(folder, "new")
    assert (folder / "content.txt").read_text() == "old"
    assert names(tmp_path) == ["run"]


def test_an_old_folder_that_cannot_be_deleted_does_not_harm_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_with(tmp_path / "run", "old")
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors=False: None)
    folder_with(folder, "new")
    assert (folder / "content.txt").read_text() == "new"
    assert "could not be deleted" in caplog.text
    (kept,) = files.leftovers(folder)
    assert (kept / "content.txt").read_text() == "old"


@pytest.mark.parametrize("call", ["mkdir", "rename 1", "rename 2", "rmtree"])
def test_a_kill_at_any_moment_loses_no_complete_folder(tmp_path: Path, call: str) -> None:
    folder = folder_with(tmp_path / "run", "old")
    script = """
import os, pathlib, shutil, sys
from elakit import files
folder, call = sys.argv[1:]
def killed(*_, **__): os._exit(9)
rename, calls = os.rename, []
def renames(source, target):
    calls.append(source)
    if call == f"rename {len(calls)}": os._exit(9)
    rename(source, target)
if call == "mkdir": pathlib.Path.mkdir = killed
if call == "rmtree": shutil.rmtree = killed
os.rename = renames
with files.replace_folder(folder) as new:
    (new / "content.txt").write_text("new")
"""
    assert subprocess.run([sys.executable, "-c", script, str(folder), call], check=False).returncode == 9
    complete = {path.read_text() for path in tmp_path.glob("**/content.txt")}
    assert "old" in complete or "new" in complete
    if call == "rename 2":  # the only moment without a folder of that name
        assert [(path / "content.txt").read_text() for path in files.leftovers(folder)] == ["old"]
    else:
        assert folder.is_dir()
    folder_with(folder, "next")
    assert (folder / "content.txt").read_text() == "next"


def test_writers_of_one_folder_leave_one_complete_folder(tmp_path: Path) -> None:
    folder, errors = tmp_path / "run", []

    def write(number: int) -> None:
        try:
            for _ in range(10):
                folder_with(folder, str(number))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert names(tmp_path) == ["run"]
    assert (folder / "content.txt").read_text() in "0123"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    real = folder_with(tmp_path / "disk" / "run", "old")
    link = tmp_path / "run"
    link.symlink_to(real, target_is_directory=True)
    folder_with(link, "new")
    assert link.is_symlink()
    assert (real / "content.txt").read_text() == "new"


def test_the_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("a cat\na dog\n".encode("utf-8-sig"))
    assert files.read_text(path) == "a cat\na dog\n"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert files.read_json(path) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a \xff cat", "not text in UTF-8"), (b"{", "not valid JSON"), (b"[" * 200_000, "not valid JSON"), (b"", "JSON")],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(OutputError, match=message) as caught:
        files.read_json(path)
    assert "run.json" in str(caught.value)


def test_a_file_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    path.write_text("[" + "0," * 1000 + "0]")
    with pytest.raises(OutputError, match=r"too large: 2,003 bytes; at most 1,000 are allowed"):
        files.read_json(path, limit=1000)


def test_text_of_a_command_line_that_is_no_unicode_is_escaped(tmp_path: Path) -> None:
    path = files.write_text(tmp_path / "report.html", "--out " + os.fsdecode(b"\xff"))
    assert path.read_text() == r"--out \udcff"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".", "it is a folder"),
        ("none/r.html", "there is no folder"),
        ("", "path of the report is empty"),
    ],
)
def test_paths_are_checked_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=message):
        files.check_path(path)
    assert files.check_path("report.html") == tmp_path / "report.html"


def test_a_message_can_be_printed_for_any_path() -> None:
    with pytest.raises(OutputError) as caught:
        files.check_path(os.fsdecode(b"none\xff/" + b"x" * 300))
    str(caught.value).encode("utf-8")
    assert len(str(caught.value)) < 700
