"""Latent attention in live transformers models: graphs, copies, training, classes, refusals."""

import copy
import pickle
import warnings

import pytest
import torch
from eager_models import (
    FAMILIES,
    batch,
    random_config,
    rewrite,
    shared_rewrite,
    source,
)
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention import MLAConfig
from attnedit.targets.attention.mla.graph import mla_graph
from attnedit.targets.runtime.eager import share_copy, splice, to_attnedit

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_are_clean(family: str) -> None:
    _, sites = source(family)
    model = shared_rewrite(family)
    for site in sites:
        graph = model.get_submodule(site.name)
        graph.graph.lint()
        targets = [str(node.target) for node in graph.graph.nodes if node.op.startswith("call")]
        assert targets.count("mla") == 1
        assert not any("attnedit.attention" in target for target in targets)
        call = next(node for node in graph.graph.nodes if node.target == "mla")
        assert call.meta["from_node"][0].name == site.anchor
        assert call.args[0].name == site.query
        used = {str(node.target).split(".")[0] for node in graph.graph.nodes if node.op in ("call_module", "get_attr")}
        assert {name for name, _ in graph.named_children()} <= used
        assert graph.layer_idx == site.layer_idx


@pytest.mark.parametrize("family", FAMILIES)
def test_deepcopy_and_pickle(family: str) -> None:
    model = shared_rewrite(family)
    inputs = batch()
    expected = model(**inputs).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert type(other.config) is type(model.config)
        assert torch.equal(other(**inputs).logits, expected)
        assert other.state_dict().keys() == model.state_dict().keys()


@torch.enable_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_and_without_checkpointing(family: str) -> None:
    model, _ = rewrite(family)
    model.train()
    inputs = batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    fresh = {name: p for name, p in model.named_parameters() if ".mla." in name}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers 5.23
                model.gradient_checkpointing_enable()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        gradients.append(torch.autograd.grad(loss, list(fresh.values())))
    for name, plain, recomputed in zip(fresh, *gradients, strict=True):
        assert plain.abs().sum() > 0, name
        torch.testing.assert_close(plain, recomputed)


def test_identical_output_projection_can_be_replaced_by_a_fresh_one_only() -> None:
    model, sites = source("llama")
    student = share_copy(model)
    site = sites[0]
    fresh = nn.Linear(32, 32, bias=False)
    graph = mla_graph(student, site, random_config(site), output_projection=fresh)
    assert graph.get_submodule("o_proj") is fresh
    assert student.get_submodule(site.name).o_proj is not fresh
    with pytest.raises(UsageError, match="o_proj"):
        mla_graph(student, site, random_config(site), output_projection=nn.Linear(32, 32))


def test_configurations_that_do_not_fit_are_refused() -> None:
    model, sites = source("llama")
    values = random_config(sites[0]).to_dict()
    for change in ({"num_attention_heads": 2}, {"input_size": 7}, {"layer_idx": 1}):
        with pytest.raises(UsageError, match="configuration has"):
            mla_graph(model, sites[0], MLAConfig(**{**values, **change}))
    qwen3, normed = source("qwen3")
    with pytest.raises(UsageError, match="cannot be folded"):
        mla_graph(qwen3, normed[0], random_config(normed[0], folded=True))
    with pytest.raises(UsageError, match="no module"):
        splice(share_copy(model), {"model.layers.7.self_attn": shared_rewrite("llama").get_submodule(sites[0].name)})
    with pytest.raises(UsageError, match="no multi-head latent attention"):
        to_attnedit(share_copy(model), {sites[0].name: random_config(sites[0])})


def test_class_is_the_sources() -> None:
    model = shared_rewrite("llama")
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model.config, LlamaConfig)
    assert type(model).__name__ == "AttneditLlamaForCausalLM"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.config.to_dict()["model_type"] == "attnedit"
