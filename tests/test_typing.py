"""A project that uses elakit can check its types: names, arguments and results are known, and mistakes are found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Large libraries are left out, or mypy would read them for minutes; what elakit itself declares is still known.
SETTINGS = """
[mypy]
strict = true
follow_imports = silent
ignore_missing_imports = true
[mypy-torch.*,diffusers.*,transformers.*,pandas.*,plotly.*,scipy.*,skimage.*,zarr.*,ipywidgets.*,IPython.*]
follow_imports = skip
"""


def test_a_script_that_uses_elakit_passes_the_strict_type_checker(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(SETTINGS, encoding="utf-8")
    script = tmp_path / "downstream.py"
    script.write_bytes((ROOT / "tests" / "downstream.py").read_bytes())
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), script.name],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
