"""A checkpoint that carries its own code: transformers' ``trust_remote_code`` loads any result, attnedit or not.

Nothing is implemented twice. The attention modules are copies of our own files, their imports made relative; the
graphs of rewritten layers are what `torch.fx` prints of them, one class for each that differs.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
import types
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.kinds import configs_in
from attnedit.targets.runtime.eager.checkpoint import CONFIG_FILE
from attnedit.targets.runtime.eager.classes import source_classes
from attnedit.targets.runtime.hf.native import complete

MODELING = "modeling_attnedit"
ROOTS = (
    "attnedit.targets.runtime.eager.cache",
    "attnedit.targets.runtime.eager.conversions",
    "attnedit.targets.runtime.hf.parts",
)
IMPORT = r"^ *from (attnedit(?:\.\w+)+{others}) import"

HEAD = '''"""{model} with other attention in the layers that config.json names. Written by attnedit; do not edit.

Every forward here is a graph as torch.fx prints it; attnedit_*.py are attnedit's own modules.
"""

from math import inf, nan  # noqa: F401

import torch  # noqa: F401
from torch import device  # noqa: F401
from transformers import {config}, {model}

from .{cache} import BoundedGeneration
from .{conversions} import register_conversions
from .{parts} import GraphAttention, put_attention_in
{imports}


'''

TAIL = '''ATTENTION = {{
{table}
}}


class Attnedit{config}({config}):
    """`{config}` of a model with other attention."""

    model_type = "attnedit"


class Attnedit{model}(BoundedGeneration, {model}):
    """`{model}` with other attention."""

    config_class = Attnedit{config}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        put_attention_in(self, ATTENTION)


register_conversions({config}, {model}, Attnedit{model})
'''


def write_remote(model: PreTrainedModel, directory: Path) -> None:
    """Write weights and configuration, and the code that loads them without attnedit.

    Tensors that the graphs read and a saved result does not have (tables of positions, constants) are written among
    the weights: the classes in the code hold them as buffers.

    Raises:
        UsageError: the source's class is not among transformers' own, or something wraps an attention module.
    """
    kinds = source_classes(model).values()
    source_config, source_model = (kind.__name__ for kind in kinds)
    transformers = importlib.import_module("transformers")
    for kind in kinds:
        if getattr(transformers, kind.__name__, None) is not kind:
            raise UsageError(f"{kind.__name__} is not one of transformers' own classes, so the code cannot import it")
    names = {"config": source_config, "model": source_model, **{_last(root): _file_name(root) for root in ROOTS}}
    graphs = _graphs(model)
    tables = {f"{site}.{name}": value for site, graph in graphs.items() for name, value in _tables(graph).items()}
    model.save_pretrained(directory, state_dict={**model.state_dict(), **tables})
    classes, table = _attention_classes(graphs)
    names["imports"] = "\n".join(sorted({line for graph in graphs.values() for line in _imports(graph)}))
    for name, text in copied_modules(
        {type(_attention(graph)[1]).__module__: None for graph in graphs.values()}
    ).items():
        (directory / f"{name}.py").write_text(text, encoding="utf-8")
    code = HEAD.format(**names) + "\n\n\n".join([*classes, TAIL.format(table=table, **names)])
    (directory / f"{MODELING}.py").write_text(code, encoding="utf-8")
    file = directory / CONFIG_FILE
    values = json.loads(file.read_text(encoding="utf-8"))
    values["auto_map"] = {
        "AutoConfig": f"{MODELING}.Attnedit{source_config}",
        "AutoModelForCausalLM": f"{MODELING}.Attnedit{source_model}",
    }
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copied_modules(attentions: Iterable[str] = ()) -> dict[str, str]:
    """Return the modules that the code needs, by file name without ending, their imports relative.

    Args:
        attentions: names of the modules that hold the new attention, ours or of a package that adds a kind; what they
            import of ours and of their own package is copied too.

    Raises:
        UsageError: a module has no file of Python that could be copied.
    """
    names, found = [*ROOTS, *attentions], dict[str, str]()
    packages = {name.partition(".")[0] for name in names} - {"attnedit"}
    imports = re.compile(IMPORT.format(others="".join(rf"|{own}(?:\.\w+)*" for own in sorted(packages))), re.MULTILINE)
    while names:
        name = names.pop()
        spec = importlib.util.find_spec(name)
        if spec is None or not str(spec.origin).endswith(".py"):
            raise UsageError(f"{name} has no file of Python that a checkpoint could carry; save the result instead")
        text = Path(str(spec.origin)).read_text(encoding="utf-8")
        found[_file_name(name)] = imports.sub(_relative, text)
        names += [other for other in imports.findall(text) if _file_name(other) not in found]
    return found


def _attention(graph: fx.GraphModule) -> tuple[str, nn.Module]:
    """The new attention in a graph, with its name."""
    name = configs_in(graph)[0][0]
    return name, graph.get_submodule(name)


def load_code(directory: Path) -> PreTrainedModel:
    """Load a directory through its own code, as transformers would, but past its cache of modules.

    Raises:
        VerificationError: a weight is missing or left over.
    """
    with _package(directory) as package:
        code = importlib.import_module(f"{package}.{MODELING}")
        values = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))["auto_map"]
        cls: Any = getattr(code, values["AutoModelForCausalLM"].rpartition(".")[2])
        return complete(*cls.from_pretrained(directory, dtype="auto", output_loading_info=True))


@contextmanager
def _package(directory: Path) -> Iterator[str]:
    """Make the modules of a directory importable under a name of their own while inside."""
    name = f"attnedit_remote_{uuid.uuid4().hex}"
    package = types.ModuleType(name)
    package.__path__ = [str(directory)]
    sys.modules[name] = package
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield name
    finally:
        sys.dont_write_bytecode = written
        for module in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
            del sys.modules[module]


def _relative(match: re.Match[str]) -> str:
    """One of our imports as it stands in a checkpoint."""
    return match[0].replace(match[1], f".{_file_name(match[1])}")


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _file_name(module: str) -> str:
    """What a checkpoint calls the copy of a module; all of ours begin with the same word."""
    own = "" if module.startswith("attnedit.") else "attnedit_"
    return own + module.replace(".", "_")


def _graphs(model: PreTrainedModel) -> dict[str, fx.GraphModule]:
    """The rewritten layers by name."""
    config: Any = model.config
    graphs = {}
    for site in config.attnedit["sites"]:
        module = model.get_submodule(site)
        if not isinstance(module, fx.GraphModule):
            raise UsageError(f"{site} is wrapped in a {type(module).__name__}; merge or remove what wraps it")
        graphs[site] = module
    return graphs


def _tables(graph: fx.GraphModule) -> dict[str, Tensor]:
    """What a graph reads that is no parameter, by name; copies, since files hold no shared memory."""
    used = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    return {name: value.detach().clone() for name, value in graph.named_buffers() if name in used}


def _imports(graph: fx.GraphModule) -> Iterator[str]:
    """Lines that import what a printed graph calls of ours, and its attention."""
    module = type(_attention(graph)[1])
    yield f"from .{_file_name(module.__module__)} import {module.__name__}"
    for name, value in graph.graph.python_code("self").globals.items():
        if getattr(value, "__module__", "").startswith("attnedit."):
            yield f"from .{_file_name(value.__module__)} import {value.__name__} as {name}"


def _attention_classes(graphs: Mapping[str, fx.GraphModule]) -> tuple[list[str], str]:
    """Print graphs: classes, and the rows of the table from layers to them."""
    names: dict[str, str] = {}
    rows = []
    for site, graph in graphs.items():
        body = _class_body(graph)
        names.setdefault(body, f"{type(graph).__name__}{len(names)}")
        rows.append(f"    {site!r}: {names[body]},")
    return [f"class {name}(GraphAttention):\n{body}" for body, name in names.items()], "\n".join(rows)


def _class_body(graph: fx.GraphModule) -> str:
    tables = {name: (tuple(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in _tables(graph).items()}
    used = [str(node.target) for node in graph.graph.nodes if node.op in ("call_module", "get_attr")]
    kind, new = _attention(graph)
    parts = tuple(dict.fromkeys(name for name in used if name not in {kind, *tables}))
    forward = graph.graph.python_code("self").src.strip()
    lines = [f"    {line}".rstrip() for line in forward.splitlines()]
    facts = [f"    kind = {kind!r}", f"    module = {type(new).__name__}"]
    facts += [f"    parts = {parts!r}", *([f"    tables = {tables!r}"] if tables else [])]
    return "\n".join(['    """The graph of an attention module."""', "", *facts, "", *lines])
