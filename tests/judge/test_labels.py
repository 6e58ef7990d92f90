"""Label files are read strictly: a refusal names file, line, the wrong value, the allowed ones and the next step."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from elakit.errors import SettingError
from elakit.judge.labels import (
    COLUMNS,
    Label,
    named_nouns,
    open_image,
    read_images,
    read_key,
    read_labels,
    read_rows,
)
from elakit.resources import data_path

HEADER = ",".join(COLUMNS)
FLAG = st.booleans()
LABEL = st.integers(1, 2).flatmap(
    lambda n: st.builds(Label, *(st.tuples(*[FLAG] * n) for _ in range(2)), hybrid=FLAG, extra=FLAG)
)
SAME_FOLDER = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "labels.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(SettingError) as refused:
        read_labels(path)
    assert str(path) in str(refused.value)
    return str(refused.value)


def test_rows_without_values_are_not_labeled_yet(tmp_path: Path) -> None:
    read = read_labels(write(tmp_path, "1,1,1,1,0,0,1", "2,,,,,,", "", "3, 1,0,,,0,0"))
    assert read == {
        1: Label((True, True), (True, False), hybrid=False, extra=True),
        3: Label((True,), (False,), hybrid=False, extra=False),
    }


def test_a_file_with_a_byte_order_mark_and_windows_line_ends_is_read(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(b"\xef\xbb\xbf" + f"{HEADER}\r\n1,1,1,,,0,0\r\n".encode())
    assert set(read_labels(path)) == {1}


def test_an_image_is_right_if_all_that_was_asked_for_is() -> None:
    assert Label((True,), (True,), hybrid=False, extra=True).right  # an extra thing was not asked for
    assert not Label((True, True), (True, True), hybrid=True, extra=False).right
    assert not Label((True, False), (True, True), hybrid=False, extra=False).right
    assert Label((True, False), (False, False), hybrid=True, extra=False).faults == (
        "not nameable",
        "wrong color",
        "hybrid",
    )
    assert Label((False,), (False,), hybrid=False, extra=False).faults == ("not nameable",)


@SAME_FOLDER
@given(st.dictionaries(st.integers(1, 9999), LABEL, max_size=5))
def test_what_is_written_is_read(tmp_path: Path, labels: dict[int, Label]) -> None:
    rows = [",".join([str(number), *label.values()]) for number, label in labels.items()]
    assert read_labels(write(tmp_path, *rows)) == labels


@SAME_FOLDER
@given(LABEL, st.sampled_from(range(1, len(COLUMNS))), st.text("0123456789xyn -.", min_size=1, max_size=3))
def test_a_value_that_is_neither_0_nor_1_is_named_with_its_line(
    tmp_path: Path, label: Label, column: int, value: str
) -> None:
    if value.strip() in ("", "0", "1"):
        return
    cells = ["7", *label.values()]
    cells[column] = value
    message = refusal(write(tmp_path, "3,,,,,,", "", ",".join(cells)))
    assert "line 4" in message
    # a value in one column of the second entity makes the empty one wrong, which may come first
    second = COLUMNS[column].startswith("second") and len(label.nameable) == 1
    assert f"{COLUMNS[column]}={value.strip()!r}: must be 0 or 1" in message or (second and "=''" in message)
    assert "Correct the value" in message


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("1,1,1,1,2,0,0", "line 2: second_color='2': must be 0 or 1, or empty together with the other column"),
        ("1,1,1,1,,0,0", "line 2: second_color='': must be 0 or 1, or empty together with the other column"),
        ("1,1,1,,1,0,0", "line 2: second_nameable='': must be 0 or 1, or empty together with the other column"),
        ("1,1,1,,,yes,0", "line 2: hybrid='yes': must be 0 or 1. Correct the value, or clear all values of the row"),
        ("1,1,,,,,", "line 2: first_color='': must be 0 or 1. Correct the value, or clear all values of the row"),
        ("1,1,1,,,0,", "line 2: extra='': must be 0 or 1."),
        ("one,1,1,,,0,0", "line 2: image='one': must be a whole number from 1 to 999999999. Correct the number."),
        ("0,1,1,,,0,0", "line 2: image='0': must be a whole number from 1 to 999999999."),
        ("-1,,,,,,", "line 2: image='-1': must be a whole number from 1 to 999999999."),
        ("1.0,1,1,,,0,0", "line 2: image='1.0': must be a whole number"),
        ("²,1,1,,,0,0", "line 2: image='²': must be a whole number"),
        (f"{'9' * 5000},1,1,,,0,0", "line 2: image='999"),
        (",1,1,,,0,0", "line 2: image='': must be a whole number"),
        (
            "1,1,1,,,0,0,1",
            "line 2 has 8 values ('1', '1', '1', '', '', '0', '0', '1'); it must have 7, one for each of",
        ),
        ("1,1,1,0,0", "line 2 has 5 values ('1', '1', '1', '0', '0'); it must have 7"),
        ("1;1;1;;;0;0", "line 2 has 1 value ('1;1;1;;;0;0'); it must have 7"),
        ('1,1,"1,,,0,0', "line 2: unexpected end of data; the file must be CSV with commas. Correct the line."),
        (
            "1,1,1,1,1,0,0\n2,1,1,,,0,0\n01,1,1,1,1,0,0",
            "line 4: image 1 is labeled twice, here and in line 2; one row per image is allowed. Keep one",
        ),
    ],
)
def test_a_wrong_row_is_refused(tmp_path: Path, row: str, what: str) -> None:
    path = write(tmp_path, row)
    assert f"{path}, {what}" in refusal(path)


def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "1,1", header="image,right")
    rule = f"they must be {', '.join(COLUMNS)}. Correct the first line."
    assert refusal(path) == f"{path}, line 1: the columns are image, right; {rule}"
    path.write_text("")
    assert refusal(path) == f"{path}, line 1: the columns are missing; {rule}"
    # another file's columns come with the caller
    columns = ("seed", *COLUMNS)
    path = write(tmp_path, "5,1,1,1,,,0,0", header=",".join(columns))
    row = read_rows(path, columns)[1]
    assert (row.line, row.cells["seed"], row.label.nameable) == (2, "5", (True,))


def test_a_file_that_cannot_be_read_is_refused_with_the_next_step(tmp_path: Path) -> None:
    assert "Write the file with `python -m benchmarks.audit` first" in refusal(tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refusal(tmp_path / "labels.csv")
    with pytest.raises(SettingError, match="Ask the labelers"):
        read_rows(tmp_path / "none.csv", hint="Ask the labelers.")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[]", "content=[]: must be an object with an entry per image. Restore the file"),
        ('{"one": {"prompt": "a cat"}}', "number of an image='one': must be a whole number from 1 to 999999999"),
        ('{"1": {}}', "image 1: prompt=None: must be a text such as 'a cat and a dog'. Restore the file"),
        ('{"1": "a cat"}', "image 1: prompt=None: must be a text"),
        ('{"1": {"prompt": 3}}', "image 1: prompt=3: must be a text"),
        ('{"1": {"prompt": " "}}', "image 1: prompt=' ': must be a text"),
        ('{"1": {"prompt": "a cat"}}', "image 1: the entry has only prompt; it must also have seed. Restore the file"),
        ("{", "is damaged: it is not valid JSON"),
    ],
)
def test_a_wrong_key_is_refused(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "key.json"
    with pytest.raises(SettingError, match=r"benchmarks\.audit` first"):
        read_key(path)
    path.write_text(text)
    with pytest.raises(SettingError) as refused:
        read_key(path, ("seed",))
    assert str(path) in str(refused.value)
    assert what in str(refused.value)


def test_the_nouns_of_a_prompt() -> None:
    assert named_nouns("a red cat and a bowl") == ("cat", "bowl")
    assert named_nouns("a monkey with a green bow") == ("monkey", "bow")
    assert named_nouns("a bowl") == ("bowl",)


def folder_of(folder: Path, prompt: str, row: str) -> Path:
    (folder / "images").mkdir()
    Image.new("L", (8, 8), 9).save(folder / "images" / "0001.png")
    (folder / "key.json").write_text(json.dumps({"1": {"prompt": prompt}, "2": {"prompt": "a cat"}}))
    return write(folder, row)


def test_labeled_images_have_their_file_and_their_prompt(tmp_path: Path) -> None:
    folder_of(tmp_path, "a cat and a bowl", "1,1,1,1,0,0,0")
    (found,) = read_images(tmp_path)
    assert (found.path.name, found.prompt, found.label.color) == ("0001.png", "a cat and a bowl", (True, False))
    assert open_image(found.path).mode == "RGB"


@pytest.mark.parametrize(
    ("prompt", "row", "what"),
    [
        (
            "a cat",
            "3,1,1,,,0,0",
            r"labels.csv, line 2: image=3: must be the number of an image in .*key.json. Corr",
        ),
        ("a cat", "2,1,1,,,0,0", r"labels.csv, line 2: .*images has no image 2, such as 0002.png .*Restore"),
        ("a cat", "1,1,1,0,0,0,0", "line 2 has labels of 2 entities, but the prompt 'a cat' has 1. Correct the row"),
        ("a cat and a bowl", "1,1,1,,,0,0", "line 2 has labels of 1 entity, but .* has 2. Correct the row"),
        ("a zebra", "1,1,1,,,0,0", "key.json, image 1, prompt 'a zebra': noun='zebra': must be one of 'cat', .*Delete"),
    ],
)
def test_labels_that_do_not_fit_the_images_are_refused(tmp_path: Path, prompt: str, row: str, what: str) -> None:
    folder_of(tmp_path, prompt, row)
    with pytest.raises(SettingError, match=what) as refused:
        read_images(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_a_file_that_is_not_an_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "0001.png"
    with pytest.raises(SettingError, match=re.escape(f"{path} cannot be read as an image")):
        open_image(path)
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:600])  # an interrupted copy
    with pytest.raises(SettingError, match=r"cannot be read as an image.*Restore the file\."):
        open_image(path)


@pytest.mark.parametrize(("name", "count"), [("seeds-100", 350), ("seeds-400", 420)])
def test_the_shipped_labels_can_be_read(name: str, count: int) -> None:
    found = read_images(data_path("judge-labels", name))
    assert len(found) == len({one.path for one in found}) == count
