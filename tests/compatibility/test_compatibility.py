"""Private names of torch and transformers: each still does what the code relies on, and none is used elsewhere.

Whoever meets a new torch or transformers sees here what was renamed.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from project import MODULES, ROOT
from tiny_llama import make_llama
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel, StaticCache
from transformers.generation import GenerationMixin

from attnedit.compiler.compatibility import live, torch_names, transformers_names
from attnedit.compiler.compatibility.torch_names import pytree

PRIVATE_MODULES = re.compile(r"(torch|transformers)(\.\w+)*\._\w|transformers\.(core_model_loading|conversion_mapping)")


def sources() -> list[Path]:
    files = (file for folder in ("compiler", "passes", "targets") for file in (ROOT / folder).rglob("*.py"))
    return [file for file in files if file.parent.name != "compatibility"]


def own_names() -> set[str]:
    """Private names that our own code defines."""
    found = set()
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                if isinstance(node.ctx, ast.Store):
                    found.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return found


OWN = own_names()


def private_uses(file: Path) -> list[str]:
    """Private names of others in one of our files, with their lines."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and node.attr not in OWN and "aten" not in ast.unparse(node):
            private = re.match(r"_[a-zA-Z]", node.attr) or (
                node.attr == "__class__" and isinstance(node.ctx, ast.Store)
            )
            if private and ast.unparse(node) not in ("sys._getframe", "torch._check", "os._exit"):  # documented
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if re.match(r"_[a-zA-Z]", str(name)) and name not in OWN:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        found += [f"{getattr(node, 'lineno', 0)}: {name}" for name in names if PRIVATE_MODULES.match(name)]
    return found


def test_private_names_stand_in_one_place() -> None:
    assert len(MODULES) > 100
    uses = {str(file.relative_to(ROOT)): found for file in sources() if (found := private_uses(file))}
    assert not uses


def test_a_private_name_would_be_found(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    lines = ["import torch.utils._pytree", "from transformers.core_model_loading import WeightConverter"]
    lines += ["config._attn_implementation = 'eager'", "model.__class__ = Other", "torch._dynamo.reset()"]
    lines += ["getattr(model, '_supports_sdpa', False)"]
    file.write_text("\n".join(lines))
    assert [use.split(":")[0] for use in sorted(private_uses(file))] == ["1", "2", "3", "4", "5", "6"]


# What is overridden in transformers.


@pytest.mark.parametrize("name", ["_prepare_cache_for_generation", "_get_static_cache_init_shape"])
def test_generation_has_the_method_that_is_overridden(name: str) -> None:
    assert callable(getattr(GenerationMixin, name, None))
    assert name in vars(live.GenerationHook)


@pytest.mark.filterwarnings("ignore")
def test_generation_runs_the_hooks_around_its_cache() -> None:
    seen: list[Any] = []

    class Hooked(live.GenerationHook, LlamaForCausalLM):
        def cache_wanted(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
            seen.append(generation_config.max_new_tokens)

        def cache_made(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
            seen.extend(type(value) for value in model_kwargs.values() if isinstance(value, DynamicCache | StaticCache))

    model: Any = make_llama()
    torch_names.share_class(model, Hooked)
    ids = torch.arange(3, 8)[None]
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert seen == [2, DynamicCache]
    model.generate(ids, max_new_tokens=2, do_sample=False, cache_implementation="static", disable_compile=True)
    assert seen[2:] == [2, StaticCache]


def test_loading_runs_the_hook_after_it_emptied_what_no_checkpoint_holds(tmp_path: Path) -> None:
    class Hooked(transformers_names.LoadingHook, LlamaForCausalLM):
        def missing_keys_filled(self) -> None:
            for buffer in self.buffers():  # type: ignore[attr-defined]
                assert not buffer.is_meta
            self.filled = True

    assert callable(getattr(PreTrainedModel, "_move_missing_keys_from_meta_to_device", None))
    make_llama().save_pretrained(tmp_path)
    assert Hooked.from_pretrained(tmp_path).filled


def test_loading_gives_missing_weights_values_and_leaves_loaded_ones(tmp_path: Path) -> None:
    class Hooked(transformers_names.LoadingHook, LlamaForCausalLM):
        def weights_missing(self) -> None:
            for parameter in self.parameters():  # type: ignore[attr-defined]
                torch.nn.init.constant_(parameter, 7.0)

    assert callable(getattr(PreTrainedModel, "initialize_weights", None))
    source = make_llama()
    source._keys_to_ignore_on_save = {"model.norm.weight"}
    source.save_pretrained(tmp_path)
    model: Any = Hooked.from_pretrained(tmp_path)
    assert bool((model.model.norm.weight == 7).all())
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)


def test_a_forward_that_is_asked_for_attention_weights_collects_them() -> None:
    seen: list[Any] = []
    model = make_llama()
    assert transformers_names.records_attention(model.model)
    assert not transformers_names.records_attention(build("bloom"))
    model.model.layers[1].register_forward_pre_hook(lambda *_: seen.append(live.recorded_attention()))
    ids = torch.arange(3, 8)[None]
    model.set_attn_implementation("eager")
    found = model(ids, output_attentions=True).attentions
    assert seen[0] is not None
    assert seen[0][0] is found[0]
    model(ids)
    assert seen[1:] == [None]
    assert live.recorded_attention() is None


# What is read and set in transformers.


def test_a_configuration_has_the_fields_of_implementations() -> None:
    config: Any = make_llama().config
    transformers_names.set_implementations(config, "sdpa", "batched_mm")
    assert vars(config)[transformers_names.ATTENTION_FIELD] == "sdpa"
    assert vars(config)[transformers_names.EXPERTS_FIELD] == "batched_mm"
    setattr(config, transformers_names.ATTENTION_FIELD, "eager")
    assert transformers_names.attention_of(config) == "eager"


def test_models_say_whether_they_support_sdpa() -> None:
    assert transformers_names.supports_sdpa(make_llama())
    assert not transformers_names.supports_sdpa(build("gpt_oss"))


def test_a_model_names_the_dtypes_that_it_loads_in() -> None:
    plan = transformers_names.dtype_plan(make_llama())
    assert isinstance(plan, dict)


def test_names_are_ignored_on_load_and_on_save(tmp_path: Path) -> None:
    model = make_llama()
    model._keys_to_ignore_on_save = {"model.norm.weight"}
    assert transformers_names.ignored_on_save(model) == ["model.norm.weight"]
    model.save_pretrained(tmp_path, state_dict={**model.state_dict(), "more": torch.zeros(2)})

    class Lenient(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            transformers_names.ignore_on_load(self, ["^more$"])

    for cls, unexpected in ((LlamaForCausalLM, {"more"}), (Lenient, set())):
        _, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["unexpected_keys"]) == unexpected
        assert set(info["missing_keys"]) == {"model.norm.weight"}


def test_weights_are_converted_when_loaded_and_back_when_saved() -> None:
    model = build("mixtral")
    conversions = transformers_names.get_model_conversion_mapping(model)
    assert any(isinstance(one, transformers_names.WeightConverter) for one in conversions)
    steps = [type(step) for one in conversions for step in getattr(one, "operations", ())]
    assert {step.__module__ for step in steps} == {transformers_names.CONVERSIONS_MODULE}
    transformers_names.set_conversions(model, conversions)
    assert transformers_names.conversions_of(model) == list(conversions)
    stored = transformers_names.revert_weight_conversion(model, model.state_dict())
    assert any(".experts.0." in name for name in stored)
    assert not any(".experts.0." in name for name in model.state_dict())


def test_conversions_are_kept_by_class_name() -> None:
    known = live.kept_conversions("mixtral")
    assert known
    live.keep_conversions("ClassOfThisTest", known)
    assert len(live.kept_conversions("ClassOfThisTest")) == len(known)
    assert live.kept_conversions("NoSuchClass") is None


def test_experts_have_a_gate_that_says_whether_it_is_the_default() -> None:
    defaults = {}
    for family in ("mixtral", "gpt_oss"):
        experts = next(m for m in build(family).modules() if hasattr(m, "_apply_gate"))
        defaults[family] = transformers_names.has_default_gate(experts)
        up = torch.randn(3, 8)
        assert transformers_names.apply_gate(experts, up).shape == (3, 4)
    assert defaults == {"mixtral": True, "gpt_oss": False}


# torch.


def test_buffers_and_which_are_temporary() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("dropped", torch.zeros(1), persistent=False)
    assert torch_names.own_buffers(module).keys() == {"kept", "dropped"}
    assert torch_names.temporary_buffers(module) == {"dropped"}
    torch_names.temporary_buffers(module).add("kept")
    assert not module.state_dict()


def test_hooks_are_found() -> None:
    module = nn.Linear(2, 2)

    def hook(*_: Any) -> None: ...

    module.register_forward_hook(hook)
    assert torch_names.forward_hooks(module) == [hook]


def test_a_linear_with_a_hook_is_not_plain() -> None:
    module = nn.Linear(2, 2)
    assert live.is_plain_linear(module)
    module.register_forward_pre_hook(lambda *_: None)
    assert not live.is_plain_linear(module)
    wrapped: Any = nn.Linear(2, 2)
    wrapped._hf_hook = object()
    assert not live.is_plain_linear(wrapped)


def test_accelerate_still_marks_a_module_with_a_hook() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    assert not live.is_plain_linear(add_hook_to_module(nn.Linear(2, 2), ModelHook()))


def test_tensors_are_kept_in_place() -> None:
    tensor = torch.zeros(2)
    live.keep_in_place(tensor)
    assert any("static" in name for name in vars(tensor))


def test_a_compiled_module_is_known() -> None:
    module = nn.Linear(2, 2)
    assert not torch_names.is_compiled(module)
    assert torch_names.is_compiled(torch.compile(module, backend="eager"))


def test_compiler_limits_hold_inside_the_block() -> None:
    before = torch._dynamo.config.recompile_limit
    with torch_names.compiler_limits(recompile_limit=before + 1, accumulated_recompile_limit=1000):
        assert torch._dynamo.config.recompile_limit == before + 1
    assert torch._dynamo.config.recompile_limit == before


def test_fake_tensors_are_made_without_a_cache_inside_the_block() -> None:
    assert FakeTensorMode().cache_enabled
    with torch_names.without_fake_cache():
        assert not FakeTensorMode().cache_enabled
    assert FakeTensorMode().cache_enabled


def exported() -> torch.export.ExportedProgram:
    class Toy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten() * 2

    return torch.export.export(Toy(), (torch.zeros(5, 3),), dynamic_shapes=({0: torch.export.Dim.AUTO},))


def test_a_symbolic_size_has_a_hint() -> None:
    sizes = next(n for n in exported().graph.nodes if n.op == "placeholder").meta["val"].shape
    assert isinstance(sizes[0], torch.SymInt)
    assert [torch_names.hint_of(size) for size in sizes] == [5, 3]


def test_operators_have_a_class_and_a_schema() -> None:
    target = torch.ops.aten.add.Tensor
    assert isinstance(target, torch_names.OpOverload)
    assert [argument.name for argument in torch_names.schema_of(target).arguments][:2] == ["self", "other"]
    assert torch_names.schema_of(len) is None
    assert str(torch_names.parse_schema(str(torch_names.schema_of(target)))) == str(torch_names.schema_of(target))
    assert "aten::add.Tensor" in torch_names.operator_names()
    assert torch_names.has_kernel("aten::add.Tensor", "CPU")
    assert isinstance(torch.ops.higher_order.cond, torch_names.HigherOrderOperator)


def test_an_exported_program_has_the_module_of_guards() -> None:
    module = exported().module()
    assert hasattr(module, torch_names.GUARDS)
    assert any(node.target == torch_names.GUARDS for node in module.graph.nodes)


def test_what_an_export_raises_and_traces_with_has_the_known_classes() -> None:
    seen = []

    class Toy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x + 1

    torch.export.export(Toy(), (torch.zeros(2),), strict=False)
    assert any(isinstance(x, torch_names.FakeTensor) for x in seen)
    assert issubclass(TorchDynamoException, RuntimeError)  # as which exporters catch it


def test_a_dispatch_mode_sees_every_operator() -> None:
    seen = []

    class Mode(torch_names.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.zeros(2).add(1)
    assert torch.ops.aten.add.Tensor in seen


def test_trees_have_paths() -> None:
    (path, leaf), *_ = pytree.tree_flatten_with_path({"a": [7]})[0]
    assert isinstance(path[0], pytree.MappingKey)
    assert isinstance(path[1], pytree.SequenceKey)
    assert (pytree.keystr(path), leaf) == ("['a'][0]", 7)


def test_a_node_remembers_what_it_was_made_from() -> None:
    node = next(n for n in exported().graph.nodes if n.op == "call_function")
    source = torch_names.NodeSource(node, "rule", torch_names.NodeSourceAction.REPLACE)
    assert source.name == node.name
    assert source.pass_name == "rule"


def test_lists_of_tensors_are_changed_at_once() -> None:
    first, second = [torch.zeros(2)], [torch.ones(2)]
    assert torch_names.foreach_lerp(first, second, 0.25)[0].tolist() == [0.25, 0.25]
    torch_names.foreach_lerp_(first, second, 0.5)
    torch_names.foreach_mul_(first, 4.0)
    assert first[0].tolist() == [2.0, 2.0]


def test_an_object_takes_on_another_class() -> None:
    class Other(nn.Linear): ...

    module = nn.Linear(2, 2)
    torch_names.share_class(module, Other)
    assert type(module) is Other
