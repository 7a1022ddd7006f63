"""Checkpoints that load without attnedit: same logits, in a process that cannot import it; refusals; model cards."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import gguf
import pytest
import torch
from commands import Captured, answer, refusal
from commands import save as save_with_tokenizer
from compiled import MODULE, _remembered, compile_tiny, deviation, exact, half, logits, source, tokens
from conftest import make_llama
from families import FAMILIES, SUPPORTED, build
from huggingface_hub import metadata_load
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, GemmaConfig, GemmaForCausalLM, PreTrainedModel

import attnedit
from attnedit.compiler.licenses import source_license
from attnedit.compiler.models import load_source
from attnedit.targets.runtime.hf import export, model_card
from attnedit.targets.runtime.hf.check import check_same
from attnedit.targets.runtime.hf.native import read_native
from attnedit.targets.runtime.hf.remote import copied_modules, load_code

IDS = tokens(2, 24)

ALONE = """
import json, sys
sys.modules["attnedit"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
directory, out, remote = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=remote == "remote").eval()
ids = torch.load(out + ".ids")
with torch.inference_mode():
    torch.save(model(ids, use_cache=False).logits, out)
    text = model.generate(ids[:1, :6], max_new_tokens=12, min_new_tokens=12, do_sample=False)
print(json.dumps({"class": type(model).__name__, "text": text[0].tolist()}))
assert not any(name.split(".")[0] == "attnedit" for name in sys.modules if sys.modules[name] is not None)
"""


def windowed(model: PreTrainedModel, target: str = "gateswa", **options: Any) -> PreTrainedModel:
    form = {"window": 6, "sinks": "none", "full_layers": 1, **options}
    with mock.patch.object(MODULE, "capture", _remembered):
        return attnedit.compile(model, target, calibration=tokens(4, 32), **form).model


def written(model: PreTrainedModel, directory: Path, profile: str, **options: Any) -> Any:
    return export(SimpleNamespace(model=model, tokenizer=None), directory, profile=profile, **options)


def gated(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose gates have learned something."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "g_proj" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    return model


def alone(directory: Path, tmp_path: Path, profile: str) -> tuple[Tensor, dict[str, Any]]:
    """Logits and greedy text of a directory, from a process without attnedit."""
    out = tmp_path / "logits"
    torch.save(IDS, f"{out}.ids")
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(directory), str(out), profile],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PATH": "", **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out), json.loads(done.stdout.splitlines()[-1])


def greedy(model: PreTrainedModel) -> list[int]:
    generate: Any = model.generate
    found: list[int] = generate(IDS[:1, :6], max_new_tokens=12, min_new_tokens=12, do_sample=False)[0].tolist()
    return found


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("profile", "family", "budget", "options"),
    [
        ("deepseek_v3", "llama", 0.5, {}),
        ("deepseek_v3", "llama", 1.0, {}),
        ("deepseek_v3", "llama", 0.5, {"rope_parameters": LLAMA3}),
        ("deepseek_v3", "smollm3", 0.5, {}),
        ("youtu", "llama", 0.5, {}),
        ("youtu", "llama", 0.5, {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
        ("youtu", "llama", 0.5, {"rope_parameters": YARN}),
        ("youtu", "mistral", 0.5, {"sliding_window": None}),
        ("youtu", "granite", 0.5, {}),
    ],
)
def test_latent_attention_as_deepseek(
    profile: str, family: str, budget: float, options: dict[str, Any], tmp_path: Path
) -> None:
    model = compile_tiny(build(family, **options), budget).model
    manifest = written(model, tmp_path / "out", profile)
    assert max(check["deviation"] for check in manifest.checks) < 1e-5
    assert deviation(logits(read_native(tmp_path / "out"), IDS), logits(model, IDS)) < 1e-5
    config: Any = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.rms_norm_eps == model.config.rms_norm_eps
    assert config.num_key_value_heads == config.num_attention_heads


def test_biases_that_are_zero_do_not_matter(tmp_path: Path) -> None:
    model = build("qwen2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    written(compile_tiny(model, 0.5).model, tmp_path / "out", "deepseek_v3")


def test_layers_of_different_sizes_are_padded(tmp_path: Path) -> None:
    model = compile_tiny(build("llama", num_hidden_layers=3), 0.55).model
    shapes = {(site["kv_lora_rank"], tuple(site["rope_columns"])) for site in model.config.attnedit["sites"].values()}
    assert len(shapes) > 1
    written(model, tmp_path / "out", "youtu")


def deepseek_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a dense DeepSeek-V3 checkpoint without query compression, from its config.json alone.

    As engines read them: q_proj, kv_a_proj_with_mqa, kv_b_proj and o_proj without bias, gate_proj and up_proj apart.
    """
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (heads * (nope + rope), hidden),
        "self_attn.kv_a_proj_with_mqa": (rank + rope, hidden),
        "self_attn.kv_a_layernorm": (rank,),
        "self_attn.kv_b_proj": (heads * (nope + value), rank),
        "self_attn.o_proj": (hidden, heads * value),
        "mlp.gate_proj": (config["intermediate_size"], hidden),
        "mlp.up_proj": (config["intermediate_size"], hidden),
        "mlp.down_proj": (hidden, config["intermediate_size"]),
    }
    tensors: dict[str, tuple[int, ...]] = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    tensors |= {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    return tensors if config["tie_word_embeddings"] else {**tensors, "lm_head.weight": (config["vocab_size"], hidden)}


def stored(directory: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("kernel_dims", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_engines_find_what_they_read(kernel_dims: bool, tied: bool, tmp_path: Path) -> None:
    model = compile_tiny(build("llama", tie_word_embeddings=tied, rms_norm_eps=1e-3), 0.25).model
    written(model, tmp_path / "out", "deepseek_v3", kernel_dims=kernel_dims)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored(tmp_path / "out") == deepseek_tensors(config)
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["q_lora_rank"] is None
    assert config["attention_bias"] is False
    assert config["rope_interleave"] is True
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["first_k_dense_replace"] == config["num_hidden_layers"]
    if kernel_dims:
        sizes = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        assert [config[name] for name in sizes] == [512, 64, 128, 128]
        # vLLM and SGLang read no other rope alike, and take rms_norm_eps for the latent's norm too.
        assert config["rope_parameters"]["rope_type"] == "default"
        assert config["rms_norm_eps"] == 1e-6


def test_kernel_dims_refuse_frequencies_that_repeat(tmp_path: Path) -> None:
    with pytest.raises(attnedit.UsageError, match="rotary frequencies"):
        written(exact("llama").model, tmp_path / "out", "deepseek_v3", kernel_dims=True)
    assert not list(tmp_path.iterdir())


def test_the_latent_norm_passes_outliers(tmp_path: Path) -> None:
    model = copy.deepcopy(half("llama").model)
    with torch.no_grad():
        model.model.embed_tokens.weight[IDS[0, 0]] *= 1e4
    written(model, tmp_path / "out", "deepseek_v3")


@pytest.mark.parametrize("profile", ["deepseek_v3", "laguna"])
def test_bfloat16_loses_no_more_than_rounding(profile: str, tmp_path: Path) -> None:
    make: Any = (lambda m: compile_tiny(m, 0.5).model) if profile == "deepseek_v3" else windowed
    model = make(build("llama", dtype=torch.bfloat16))
    written(model, tmp_path / "out", profile)
    precise = logits(copy.deepcopy(model).float(), IDS)
    ours, theirs = (logits(m, IDS).float() for m in (model, read_native(tmp_path / "out")))
    assert (theirs - precise).square().mean() < 3 * (ours - precise).square().mean()


@pytest.mark.parametrize(
    ("profile", "make"), [("youtu", lambda: half("llama").model), ("lfm3", lambda: windowed(source("llama")))]
)
def test_float16_is_refused(profile: str, make: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(make()).half()
    with pytest.raises(attnedit.UsageError, match="float16"):
        written(model, tmp_path / "out", profile)


@pytest.mark.parametrize(
    ("family", "options", "profile", "architecture"),
    [
        ("qwen3", {}, "laguna", "LagunaForCausalLM"),
        ("qwen3", {"gate": "head"}, "laguna", "LagunaForCausalLM"),
        ("qwen3", {"gate": "element"}, "lfm3", "Lfm3ForCausalLM"),
        ("qwen3", {"gate": "head"}, "native", "Qwen3ForCausalLM"),
        ("qwen2", {}, "laguna", "LagunaForCausalLM"),
        ("qwen2", {}, "native", "Qwen2ForCausalLM"),
        ("llama", {"gate": "head"}, "laguna", "LagunaForCausalLM"),
        ("llama", {}, "lfm3", "Lfm3ForCausalLM"),
        ("llama", {}, "native", "Qwen2ForCausalLM"),
        ("gpt_oss", {"sinks": "logit", "full_layers": 0, "window": 4}, "native", "GptOssForCausalLM"),
        ("gemma2", {"full_layers": 0, "window": 4}, "native", "Gemma2ForCausalLM"),
    ],
)
def test_windows_as_other_classes(
    family: str, options: dict[str, Any], profile: str, architecture: str, tmp_path: Path
) -> None:
    model = windowed(source(family), **options)
    manifest = written(model, tmp_path / "out", profile)
    assert manifest.architecture == architecture
    assert max(check["deviation"] for check in manifest.checks) < 1e-5
    # Through the window's edge, in prefill and in decoding.
    assert {sum(check["lengths"]) for check in manifest.checks} == {
        model.config.attnedit["sites"]["model.layers.1.self_attn"]["sliding_window"] + by for by in (4, 10)
    }


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2"])
def test_trained_gates_as_lfm3(family: str, tmp_path: Path) -> None:
    model = gated(windowed(source(family), gate="head"))
    assert deviation(logits(model, IDS), logits(windowed(source(family)), IDS)) > 1e-2
    manifest = written(model, tmp_path / "out", "lfm3")
    assert max(check["deviation"] for check in manifest.checks) < 1e-5


@pytest.mark.parametrize(
    ("make", "profile", "reason"),
    [
        (lambda: half("qwen3").model, "deepseek_v3", "queries normalised"),
        (lambda: half("qwen2").model, "youtu", "a bias"),
        (lambda: half("mistral").model, "deepseek_v3", "sliding window"),
        (lambda: half("gpt_oss").model, "deepseek_v3", "no latent attention"),
        (lambda: half("phi3").model, "deepseek_v3", "gate_up_proj"),
        (lambda: compile_tiny(build("granite", logits_scaling=2.0), 0.5).model, "youtu", "logits_scaling"),
        (lambda: half("llama").model, "laguna", "latent attention"),
        (lambda: windowed(source("llama")), "deepseek_v3", "no latent attention"),
        (lambda: gated(windowed(source("qwen3"), gate="head")), "laguna", "sigmoid"),
        (lambda: gated(windowed(source("qwen3"), gate="element")), "lfm3", "per element"),
        (lambda: gated(windowed(source("qwen3"), gate="head")), "native", "trained gate"),
        (lambda: windowed(source("qwen3"), sinks="keep:4"), "laguna", "kept sink tokens"),
        (lambda: windowed(source("qwen3"), sinks="logit"), "native", "sink logits"),
        (lambda: windowed(source("olmo2")), "lfm3", "projection norm"),
        (lambda: windowed(source("smollm3")), "laguna", "no rotary embedding"),
    ],
)
def test_what_a_class_lacks_is_refused_by_name(make: Any, profile: str, reason: str, tmp_path: Path) -> None:
    refused(make(), profile, reason, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "profile", "reason"),
    [
        (lambda: compile_tiny(build("gpt_oss", layer_types=["full_attention"] * 2), 0.5).model, "youtu", "sink logits"),
        (lambda: compile_tiny(build("gemma2", layer_types=["full_attention"] * 2), 0.5).model, "youtu", "softcap"),
        (lambda: windowed(source("glm4")), "laguna", "neighbours"),
    ],
)
def test_what_rarer_classes_lack_is_refused_by_name(make: Any, profile: str, reason: str, tmp_path: Path) -> None:
    refused(make(), profile, reason, tmp_path)


def refused(model: PreTrainedModel, profile: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(attnedit.UsageError, match=reason) as caught:
        written(model, tmp_path / "out", profile)
    assert not list(tmp_path.iterdir())
    assert "\n" not in str(caught.value)


def test_a_class_that_computes_otherwise_is_noticed(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 128}
    torch.manual_seed(0)
    # Its norms add 1 to their weights, which no name or shape tells.
    gemma = GemmaForCausalLM(GemmaConfig(**sizes, initializer_range=0.3)).eval()
    with pytest.raises(attnedit.VerificationError, match="deviate"):
        written(compile_tiny(gemma, 0.5).model, tmp_path / "out", "deepseek_v3")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "profile"),
    [
        (lambda: half("llama").model, "deepseek_v3"),
        (lambda: windowed(source("qwen3"), gate="head"), "laguna"),
        (lambda: half("qwen3").model, "remote"),
        (
            lambda: windowed(source("gpt_oss"), gate="head", sinks="logit,value,keep:2", full_layers=0, window=4),
            "remote",
        ),
    ],
)
def test_a_machine_without_attnedit_loads_it(make: Any, profile: str, tmp_path: Path) -> None:
    model = make()
    written(model, tmp_path / "out", profile)
    found, told = alone(tmp_path / "out", tmp_path, profile)
    assert deviation(found, logits(model, IDS)) < 1e-5
    assert told["text"] == greedy(model)


def test_a_remote_checkpoint_is_ours_too(tmp_path: Path) -> None:
    result = half("llama")
    result.export("hf", tmp_path / "out", profile="remote")
    again = attnedit.load(tmp_path / "out")
    assert torch.equal(logits(again.model, IDS), logits(result.model, IDS))
    assert again.report.kv_budget_achieved == result.report.kv_budget_achieved


def test_remote_code_needs_nothing_of_ours() -> None:
    modules = copied_modules()
    assert {"attnedit_mla", "attnedit_gateswa", "attnedit_parts"} <= set(modules)
    for text in modules.values():
        assert "from attnedit." not in text.replace("from attnedit.targets.runtime.hf import", "")
        assert "import attnedit" not in text


TABLES = {("gptj", "mla"), ("gpt_neo", "mla"), ("gptj", "gateswa"), ("gpt_neo", "gateswa"), ("falcon", "gateswa")}
"""Families whose graphs hold tables of positions that no checkpoint has."""


@pytest.mark.long
@pytest.mark.parametrize("family", [name for name in SUPPORTED if not FAMILIES[name].mla])
@pytest.mark.parametrize("kind", ["mla", "gateswa"])
def test_remote_families(family: str, kind: str, tmp_path: Path) -> None:
    form = {"full_layers": 0, "window": 4, "gate": "head", "sinks": "logit,value,keep:2"}
    model = half(family).model if kind == "mla" else windowed(source(family), **form)
    if (family, kind) in TABLES:
        with pytest.raises(attnedit.UsageError, match="which is no weight and cannot be printed"):
            written(model, tmp_path / "out", "remote")
        return
    manifest = written(model, tmp_path / "out", "remote")
    assert max(check["deviation"] for check in manifest.checks) < 1e-6
    check_same(model, load_code(tmp_path / "out"))


def test_every_directory_has_a_card(tmp_path: Path) -> None:
    original = tmp_path / "source"
    make_llama().save_pretrained(original)
    (original / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    model = load_source(str(original)).model
    result = attnedit.compile(model, "mla", kv_budget=0.5, calibration=tokens(4, 32))
    result.save(tmp_path / "saved")
    result.export("hf", tmp_path / "native", profile="deepseek_v3")
    for name, words in {"saved": "attnedit.load", "native": "profile deepseek_v3"}.items():
        text = (tmp_path / name / "README.md").read_text()
        assert words in text
        assert "0.5" in text
        assert "multi-head latent attention" in text
        assert str(tmp_path) not in text
        data = metadata_load(tmp_path / name / "README.md")
        assert data is not None
        assert data["license"] == "apache-2.0"
        assert data["library_name"] == "transformers"
    assert attnedit.load(tmp_path / "saved").report.license == "apache-2.0"


def test_a_gguf_tells_its_licence(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_languages(["en", "de"])
    writer.add_license("mit")
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert source_license(str(tmp_path / "model.gguf")) == "mit"
    assert source_license(str(tmp_path / "none.gguf")) is None
    assert source_license(str(tmp_path)) is None


def test_a_card_without_a_licence_says_so() -> None:
    report = half("llama").report.model_copy(update={"source": "someone/a-model", "perplexity": {"source": 3.0}})
    text = model_card(report)
    assert "could not find out" in text
    assert "source 3.00" in text
    assert 'base_model: "someone/a-model"' in text
    assert "license" not in text.split("---")[1]


def test_command_line(tmp_path: Path, capsys: Captured) -> None:
    save_with_tokenizer(make_llama(), tmp_path / "source")
    data = tmp_path / "notes.txt"
    data.write_text("One and two are three. " * 400)
    arguments = ["--kv-budget", "0.5", "--calibration", str(data), "--calibration-tokens", "2048"]
    answer(capsys, "compile", str(tmp_path / "source"), *arguments, "-o", str(tmp_path / "mla"))
    saved, out = str(tmp_path / "mla"), str(tmp_path / "out")
    told = answer(capsys, "export", saved, "--to", "hf", "--profile", "deepseek_v3", "-o", out)
    assert told["profile"] == "deepseek_v3"
    assert all(check["deviation"] < 1e-3 for check in told["checks"])
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert "2,048 tokens" in (tmp_path / "out" / "README.md").read_text()
    other = str(tmp_path / "other")
    for arguments, message in (
        ([saved, "--to", "hf"], "--profile"),
        ([saved, "--to", "hf", "--profile", "bloom"], "'bloom' is not known"),
        ([saved, "--to", "hf", "--profile", "laguna"], "latent attention"),
        ([saved, "--to", "hf", "--profile", "remote", "--kernel-dims"], "--kernel-dims"),
        ([saved, "--to", "hf", "--profile", "remote", "--opset", "18"], "no option --opset"),
        ([saved, "--to", "onnx", "--profile", "remote"], "no option --profile"),
        ([str(tmp_path / "source"), "--to", "hf", "--profile", "remote"], "not rewritten"),
    ):
        assert message in refusal(capsys, "export", *arguments, "-o", other)
        assert not (tmp_path / "other").exists()
