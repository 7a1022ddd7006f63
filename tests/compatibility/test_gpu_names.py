"""What transformers is kept from on a GPU: kernels that hold all logits, and masks while a graph is captured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_llama import make_llama
from transformers import masking_utils
from transformers.integrations import sdpa_attention
from transformers.utils import import_utils

from attnedit.compiler.compatibility import transformers_names


def test_heads_are_repeated_in_float32_on_a_gpu_alone() -> None:
    def shared(dtype: torch.dtype, cuda: bool) -> bool:
        key: Any = SimpleNamespace(is_cuda=cuda, dtype=dtype, shape=(1, 2, 8, 64))
        return bool(sdpa_attention.use_gqa_in_sdpa(None, key, key))

    assert shared(torch.float32, True)
    with transformers_names.repeated_heads():
        assert not shared(torch.float32, True)
        assert shared(torch.bfloat16, True)
        assert shared(torch.float32, False)
    assert shared(torch.float32, True)


def test_a_model_that_is_captured_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model, masks = make_llama(), []
    hook = model.model.layers[0].register_forward_pre_hook
    hook(lambda _, __, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    ids = torch.arange(3, 8)[None]
    assert import_utils.is_tracing()
    with transformers_names.as_if_not_capturing():
        assert not import_utils.is_tracing()
        assert masking_utils.find_packed_sequence_indices(ids) is None
        model(ids)
    assert masks == [None]
    assert import_utils.is_tracing()
    assert masking_utils.find_packed_sequence_indices(ids) is not None
