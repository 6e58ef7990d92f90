"""Attention of video models is read without an adapter, as the page on supported models shows."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from captured import Witness
from diffusers import WanTransformer3DModel

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
FRAMES, ROWS, COLUMNS = 3, 4, 6


def test_attention_of_wan_is_read_as_the_page_shows() -> None:
    torch.manual_seed(0)
    net: Any = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, FRAMES, 2 * ROWS, 2 * COLUMNS),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
    }

    @torch.no_grad()
    def run(**_: Any) -> Any:
        return SimpleNamespace(frames=[net(**inputs, return_dict=False)[0]])

    plain = run().frames[0]
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text[text.index("## Video") :], flags=re.S)
    read: list[tuple[str, tuple[int, int], torch.Tensor]] = []
    code = code.replace("    maps = ", "    read.append((layer.name, size, attend(slice(0, 1))))\n    maps = ")
    given: dict[str, Any] = {"pipe": type("Pipe", (), {"transformer": net, "__call__": staticmethod(run)})()}
    witness = Witness({f"blocks.{i}.attn2": block.attn2 for i, block in enumerate(net.blocks)})
    with witness:
        exec(code, given | {"read": read})
    assert [(name, size) for name, size, _ in read] == [(f"blocks.{i}.attn2", (FRAMES * ROWS, COLUMNS)) for i in (0, 1)]
    for (name, _, found), (seen, truth) in zip(read, witness.seen, strict=True):
        assert name == seen
        torch.testing.assert_close(found.double(), truth, atol=1e-5, rtol=0)
    assert torch.equal(plain, run().frames[0])
