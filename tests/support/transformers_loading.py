"""Checks of `tests/test_modeling_common.py`: building, saving, loading, tied weights."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers_checks import DoesNotApply, Subject, check, inputs


def same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert sorted(first) == sorted(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def saved(model: Any, directory: str, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return Path(directory)


def reloaded(model: Any, **options: Any) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        saved(model, directory)
        return type(model).from_pretrained(directory, **options)


@check
def save_load(subject: Subject) -> None:
    model = subject.model()
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        written = {file.name for file in saved(model, directory).iterdir()}
        assert {"config.json", "generation_config.json", "model.safetensors"} <= written
        again = subject.kind.from_pretrained(directory)
        torch.testing.assert_close(again(**inputs()).logits, model(**inputs()).logits)
        saved(again, directory)
        subject.kind.from_pretrained(directory)


@check
def from_pretrained_no_checkpoint(subject: Subject) -> None:
    weights = subject.model().state_dict()
    again = subject.kind.from_pretrained(None, config=subject.config, state_dict=weights)
    same_weights(again.state_dict(), subject.model().state_dict())


def fp32_names(model: Any) -> tuple[set[str], set[str]]:
    loose, strict = set(model._keep_in_fp32_modules), set(model._keep_in_fp32_modules_strict)
    if not loose and not strict:
        raise DoesNotApply("nothing is kept in float32")
    return loose, strict


def named(name: str, parts: set[str]) -> bool:
    return any(re.search(rf"(?:^|\.){part}(?:\.|$)", name) for part in parts)


@check
def keep_in_fp32_modules_exist(subject: Subject) -> None:
    model = subject.model()
    loose, strict = fp32_names(model)
    for part in loose | strict:
        assert any(named(name, {part}) for name in model.state_dict()), part


@check
def keep_in_fp32_modules(subject: Subject) -> None:
    loose, strict = fp32_names(subject.model())
    for dtype, kept in ((torch.float16, loose | strict), (torch.bfloat16, strict)):
        for name, value in reloaded(subject.model(), dtype=dtype).state_dict().items():
            if value.is_floating_point():
                assert value.dtype == (torch.float32 if named(name, kept) else dtype), name


@check
def save_load_keys_to_ignore_on_save(subject: Subject) -> None:
    model = subject.model()
    ignored = set(model._keys_to_ignore_on_save or ())
    if not ignored:
        raise DoesNotApply("no weight is left out of checkpoints")
    with tempfile.TemporaryDirectory() as directory:
        held = load_file(saved(model, directory) / "model.safetensors")
    assert not ignored & set(held)
    assert set(model.load_state_dict(held, strict=False).missing_keys) <= ignored


@check
def load_contiguous_weights(subject: Subject) -> None:
    for model in (subject.model(), reloaded(subject.model())):
        assert all(parameter.is_contiguous() for parameter in model.parameters())


@check
def can_init_all_missing_weights(subject: Subject) -> None:
    """Whatever a checkpoint lacks is given values, and none stays on meta."""
    built = subject.new()
    empty = subject.kind.from_pretrained(None, config=subject.config, state_dict={})
    assert sorted(built.state_dict()) == sorted(empty.state_dict())
    for name, value in [*empty.named_parameters(), *empty.named_buffers()]:
        assert not value.is_meta, name
        assert torch.isfinite(value).all(), name
    for (name, first), second in zip(built.state_dict().items(), empty.state_dict().values(), strict=True):
        if first.numel() < 64 or not first.is_floating_point():
            continue
        # Theirs seeds each initialisation; here both must be spread alike.
        torch.testing.assert_close(first.std(), second.std(), rtol=0.6, atol=1e-6, msg=name)


@check
def init_weights_can_init_buffers(subject: Subject) -> None:
    built = dict(subject.new().named_buffers())
    with torch.device("meta"):
        model = subject.kind(subject.config)
    model.to_empty(device="cpu")
    model.init_weights()
    same_weights(built, dict(model.named_buffers()))


@check
def all_tensors_are_parameter_or_buffer(subject: Subject) -> None:
    with torch.device("meta"):
        model = subject.kind(subject.config).eval()
    model.to_empty(device="cpu")
    model.init_weights()
    assert torch.isfinite(model(**inputs()).logits).all()


@check
def can_be_initialized_on_meta(subject: Subject) -> None:
    with torch.device("meta"):
        model = subject.kind(subject.config)
    assert all(parameter.is_meta for parameter in model.parameters())


@check
def cannot_load_with_meta_device_context_manager(subject: Subject) -> None:
    with (
        tempfile.TemporaryDirectory() as directory,
        torch.device("meta"),
        pytest.raises(RuntimeError, match="with a meta device context manager"),
    ):
        subject.kind.from_pretrained(saved(subject.model(), directory))


@check
def torch_save_load(subject: Subject) -> None:
    weights = subject.model().state_dict()
    for zipped in (True, False):
        with tempfile.NamedTemporaryFile() as file:
            torch.save(weights, file.name, _use_new_zipfile_serialization=zipped)
            same_weights(torch.load(file.name), weights)


@check
def can_use_safetensors(subject: Subject) -> None:
    model = subject.model()
    again, info = reloaded(model, output_loading_info=True)
    same_weights(model.state_dict(), again.state_dict())
    shared: dict[int, list[str]] = defaultdict(list)
    for name, value in model.state_dict().items():
        shared[value.data_ptr()].append(name)
    for names in shared.values():
        assert len({again.state_dict()[name].data_ptr() for name in names}) == 1, names
    assert not info["missing_keys"]


@check
def load_save_without_tied_weights(subject: Subject) -> None:
    config = subject.config
    config.tie_word_embeddings = False
    model = subject.new(config)
    again, info = reloaded(model, output_loading_info=True)
    same_weights(model.state_dict(), again.state_dict())
    assert not info["missing_keys"]
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()


@check
def tied_weights_keys(subject: Subject) -> None:
    config = subject.config
    config.tie_word_embeddings = True
    model = subject.new(config)
    places: dict[int, set[str]] = defaultdict(set)
    for name, value in model.state_dict().items():
        places[value.untyped_storage().data_ptr()].add(name)
    tied = {name for names in places.values() if len(names) > 1 for name in names}
    assert tied == {name for pair in model._tied_weights_keys.items() for name in pair}


@check
def model_weights_reload_no_missing_tied_weights(subject: Subject) -> None:
    """A checkpoint with none of the weights misses exactly those that one would hold."""
    model = subject.model()
    with tempfile.TemporaryDirectory() as directory:
        place = saved(model, directory)
        save_file({"tensor": torch.tensor([1, 2])}, place / "model.safetensors", metadata={"format": "pt"})
        again, info = subject.kind.from_pretrained(place, output_loading_info=True)
    tied = set(again._tied_weights_keys or ()) if again.config.tie_word_embeddings else set()
    expected = {name for name, _ in [*again.named_parameters(), *again.named_buffers()]} & set(again.state_dict())
    assert set(info["missing_keys"]) - tied == expected - tied


@check
def correct_missing_keys(subject: Subject) -> None:
    """A base model's checkpoint lacks the head, which is said."""
    config = subject.config
    config.tie_word_embeddings = False
    with tempfile.TemporaryDirectory() as directory:
        saved(subject.new(config).base_model, directory)
        _, info = subject.kind.from_pretrained(directory, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
