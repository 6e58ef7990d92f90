"""Attention calls can be read and biased, with whatever mask the layer uses."""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F

from elakit.attention.calls import AttentionCall, biasing, changing, watching

QUERIES, KEYS = 3, 3


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, QUERIES, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    return query, key, value


def expected(bias: torch.Tensor) -> torch.Tensor:
    query, key, value = tensors()
    scores = query @ key.mT / math.sqrt(4) + bias
    future = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ value


def test_a_bias_is_added_to_causal_attention_and_no_query_sees_later_keys() -> None:
    bias = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
    seen: list[AttentionCall] = []
    with biasing(lambda _: bias), watching(seen.append):
        output = F.scaled_dot_product_attention(*tensors(), is_causal=True)
    torch.testing.assert_close(output, expected(bias))
    assert seen[0].mask is not None
    assert (seen[0].mask[torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)] <= -5e3).all()


def test_causal_attention_that_is_only_read_stays_as_it_is() -> None:
    seen: list[AttentionCall] = []
    with watching(seen.append):
        output = F.scaled_dot_product_attention(*tensors(), is_causal=True)
    torch.testing.assert_close(output, expected(torch.zeros(KEYS, dtype=torch.float64)))
    assert seen[0].mask is not None
    assert seen[0].mask.tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    with changing(lambda call: call, lambda call, output: None):
        torch.testing.assert_close(F.scaled_dot_product_attention(*tensors(), is_causal=True), output)


def test_a_mask_beside_is_causal_hides_more_keys() -> None:
    mask = torch.tensor([[True, False, True], [False, True, True], [False, True, True]])
    seen: list[AttentionCall] = []
    with watching(seen.append), contextlib.suppress(RuntimeError):  # some of torch's kernels refuse both
        F.scaled_dot_product_attention(*tensors(), attn_mask=mask, is_causal=True)
    assert seen[0].mask is not None
    assert seen[0].mask.tolist() == [[True, False, False], [False, True, False], [False, True, True]]
