"""Sources with peculiarities: wrapped linear modules, sizes that are fixed, decoding that is not prefill."""

from __future__ import annotations

from typing import Any

import pytest
from compiled import tokens
from tiny_llama import make_llama
from transformers import BltConfig, BltForCausalLM, LlamaForCausalLM, MoshiConfig, MoshiForCausalLM

from attnedit.compiler.capture.capture import capture
from attnedit.compiler.errors import CaptureError, VerificationError
from attnedit.compiler.execution.verify import decode_error, decode_note, same_decode


def test_a_linear_module_that_is_wrapped_is_found() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "ffn_dim": 48}
    model = MoshiForCausalLM(MoshiConfig(vocab_size=64, num_hidden_layers=1, **sizes)).eval()
    (site,) = capture(model)
    assert site.o_proj.module == "o_proj.linear"
    assert site.k_proj is not None
    assert site.k_proj.weight == "k_proj.linear.weight"


@pytest.mark.long
def test_what_cannot_be_evaluated_is_refused_with_its_node() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    part = {"vocab_size": 64, "num_hidden_layers": 1, "intermediate_size": 48, **sizes}
    local = {**part, "hidden_size_global": 32}
    config = BltConfig(
        vocab_size=64,
        encoder_hash_byte_group_vocab=64,
        patcher_config=part,
        global_config=part,
        encoder_config=local,
        decoder_config=local,
    )
    with pytest.raises(CaptureError, match=r"modeling_blt.py:\d+\): queries, keys and values do not come from one"):
        capture(BltForCausalLM(config).eval())


class Unsteady(LlamaForCausalLM):
    """Off by a thousandth where tokens are cached, as a hybrid whose decoding is not its prefill."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = super().forward(*args, **kwargs)
        if kwargs.get("use_cache"):
            result.logits[..., 0] += 1e-3 * result.logits.abs().max()
        return result


def test_a_result_may_be_off_where_its_source_is() -> None:
    model = make_llama()
    ids = tokens(1, 24)
    assert decode_error(model, ids, sites=2) == 0.0
    model.__class__ = Unsteady
    own = decode_error(model, ids, sites=1)
    assert own == pytest.approx(1e-3, rel=0.1)
    with pytest.raises(VerificationError, match="decoding from the cache"):
        same_decode(model, ids)
    assert same_decode(model, ids, own=own).tolerance == pytest.approx(2 * own)
    assert decode_note(own) == ["the source's own decoding is off its prefill by 1.0e-03 of the largest logit"]
