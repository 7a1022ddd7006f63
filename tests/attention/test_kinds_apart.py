"""Nothing asks for a kind of attention by name or class: kinds say themselves what others need of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import attnedit
from attnedit.passes.targets import OWN
from attnedit.targets.attention.kinds import KINDS
from attnedit.testing import refused, tiny_model, tokens

ROOT = Path(__file__).parents[2]
NAMES = {"mla", "gateswa"}
PLACES = tuple(f"attnedit.{folder}.{name}" for folder in ("targets.attention", "passes") for name in NAMES)

# A runtime's part for one kind is what a kind's `lowerings` and `profiles` name. Beside those:
SHARED = {
    "targets/runtime/latent.py": "what the lowerings of latent attention share",
    "targets/runtime/windowed.py": "what the lowerings of windows share",
    "targets/runtime/hf/latent.py": "latent attention as matrices, for its profiles and its GGUF",
    "targets/runtime/hf/windowed.py": "layers with windows, for their profiles and their GGUF",
    "targets/runtime/vllm/attention.py": "the modules that vllm/served.py names, which only vLLM can import",
    "targets/runtime/vllm/latent_layer.py": "the layer of one of those modules",
    "targets/runtime/vllm/paged_attention.py": "what that layer computes",
    "targets/runtime/vllm/paged_steps.py": "the same for one new token, by the kernel of latent attention",
}
LISTS = {
    "targets/attention/__init__.py": "public names",
    "targets/attention/config.py": "where version 0.1 documented public names",
    "targets/attention/kinds.py": "the list of our kinds",
    "passes/targets.py": "the list of our targets",
}
DEFAULTS = {
    "compiler/api/_checkpoint.py": "the default of a public argument",
    "compiler/api/_compile.py": "the default of a public argument",
    "compiler/api/options.py": "the default of the option target",
    "compiler/api/recipe.py": "the default of the option target",
    "compiler/api/cli/demo.py": "what the demonstration shows",
    "compiler/api/arguments.py": "the type of the option full_layers",
}


def registered() -> set[str]:
    """Files that kinds name."""
    places = [place for kind in KINDS.values() for place in (*kind.lowerings.values(), *kind.profiles.values())]
    modules = {place.partition(":")[0].removeprefix("attnedit.") for place in places}
    return {f"{module.replace('.', '/')}.py" for module in modules}


def sources() -> Iterator[Path]:
    own = {ROOT / folder / name for folder in ("targets/attention", "passes") for name in NAMES}
    for folder in ("compiler", "passes", "targets"):
        yield from (path for path in (ROOT / folder).rglob("*.py") if not own & set(path.parents))


def asked(path: Path) -> Iterator[str]:
    """Names of kinds in the code of a file, and what it imports of their folders."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = {kind.config.__name__ for kind in KINDS.values() if kind.name in NAMES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in NAMES | classes:
            yield f"line {node.lineno}: {node.value!r}"
        elif isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(tuple(f"{p}." for p in PLACES)):
            yield f"line {node.lineno}: from {node.module}"
        elif isinstance(node, ast.Import):
            yield from (f"line {node.lineno}: {name.name}" for name in node.names if name.name.startswith(PLACES))


def test_kinds_are_asked_for_by_nobody() -> None:
    allowed = {*SHARED, *LISTS, *DEFAULTS, *registered()}
    found = {str(path.relative_to(ROOT)): list(asked(path)) for path in sources()}
    wrong = {name: lines for name, lines in found.items() if lines and name not in allowed}
    assert not wrong, f"ask the kind's own object instead: {wrong}"
    idle = sorted(name for name in {*SHARED, *LISTS, *DEFAULTS} if not found.get(name))
    assert not idle, f"allowed without need: {idle}"


def test_what_kinds_name_is_there() -> None:
    for kind in KINDS.values():
        assert all(kind.lowering(runtime) is not None for runtime in kind.lowerings if runtime != "gguf"), kind.name
        assert all(kind.profile(name) is not None for name in kind.profiles), kind.name
    assert {target.kind.name for target in OWN.values()} == NAMES


def test_a_result_without_new_attention_is_refused_in_a_line(tmp_path: Path) -> None:
    result = attnedit.compile(tiny_model(), kv_budget=1.0, fuel=0, verify=False)
    with refused("no layer was rewritten, and vllm runs the source as it is", result.model):
        result.export("hf", tmp_path / "out", engine="vllm")
    with refused("no layer was rewritten; save the result", result.model):
        result.export("gguf", tmp_path / "out")


def test_layers_of_two_kinds_are_refused_by_what_holds_one(tmp_path: Path) -> None:
    model = tiny_model()
    data = tokens(4, 48)
    options = {"window": 8, "full_layers": [1], "kv_budget": 0.6, "calibration": data, "alternations": 0}
    result = attnedit.compile(model, "gateswa+mla", verify=False, **options)  # type: ignore[arg-type]
    for runtime, options, words in (
        ("hf", {"profile": "deepseek_v3"}, "(GateSWA), which profile deepseek_v3 does not have; use --profile remote"),
        ("hf", {"profile": "native"}, "(MLA), which profile native does not have; use --profile remote"),
        (
            "gguf",
            {},
            "llama.cpp has no architecture with gated sliding-window attention (GateSWA) and multi-head latent",
        ),
    ):
        with refused(words, result.model):
            result.export(runtime, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
