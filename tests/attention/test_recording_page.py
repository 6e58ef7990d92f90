"""The code of the page on recording runs as printed, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tiny_videos import tiny_wan

PAGE = Path(__file__).parents[2] / "docs" / "recording.md"


def test_the_code_on_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    there: dict[str, Any] = {"video_pipe": tiny_wan()}
    for block in blocks:
        quick = block.replace("num_inference_steps=25", "num_inference_steps=2")
        quick = quick.replace("pipe(prompt.text)", "pipe(prompt.text, num_inference_steps=2)")
        quick = quick.replace("num_frames=33", "num_frames=5, height=32, width=48")
        exec(compile(quick, str(PAGE), "exec"), there)
    assert there["later"].steps == (0, 1)
    raw, spread = (there["recording"].maps("car", layers="up", refine=times) for times in (0, 1))
    assert raw.shape == spread.shape == (2, 1, 16, 16)
    # A refined map stays within the range of the map that was propagated.
    assert float(raw.min()) - 1e-3 <= float(spread.min())
    assert float(spread.max()) <= float(raw.max()) + 1e-3
