"""Bad input to every command: exit 2, one line that says what, where and what to do, and nothing written."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Captured, answer, refusal, refusal_as_json, save
from compiled import MODULE
from families import FAMILIES, build
from tiny_llama import make_llama
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerBase,
    T5Config,
)

from attnedit.cli import main
from attnedit.compiler.capture.capture import capture
from attnedit.compiler.capture.sites import AttentionSite

COMMANDS = ["inspect", "compile", "eval", "generate", "sweep"]
Refused = Callable[..., str]
SWEEP: Any = importlib.import_module("attnedit.cli.sweep")


def command_line(name: str, model: object, text: object = "notes.txt") -> list[object]:
    """A command that would succeed on a model that is in order; what it writes would be in ``out``."""
    measure = ["--text", text, "--seq-len", 32, "--windows", 2]
    fit = ["--calibration", text, "--calibration-tokens", 512, "--alternations", 0, "-o", "out"]
    options = {
        "inspect": [],
        "compile": fit,
        "eval": measure,
        "generate": ["--prompt", "Hello", "--max-new-tokens", 2],
        "sweep": [*measure, *fit, "--kv-budgets", "0.5"],
    }
    return [name, model, *options[name]]


@pytest.fixture
def workplace(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a text in it."""
    (tmp_path / "notes.txt").write_text(text_file.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SITES: list[AttentionSite] = []


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sites of the tiny Llama, remembered: tracing it again for every bad option is what would take time."""
    if not SITES:
        SITES.extend(capture(make_llama()))
    for module in (MODULE, SWEEP):
        monkeypatch.setattr(module, "capture", lambda _: SITES)


@pytest.fixture
def refused(workplace: Path, capsys: Captured) -> Refused:
    """Run a command that must refuse and write nothing; gives the line on stderr."""

    def run(*arguments: object, code: int = 2) -> str:
        before = sorted(workplace.rglob("*"))
        message = refusal_as_json(capsys, *arguments, code=code)
        assert sorted(workplace.rglob("*")) == before
        assert "unexpected" not in message
        return message

    return run


def bert(directory: Path, kind: type[Any] | None) -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=64)
    (config if kind is None else kind(config)).save_pretrained(directory)


def broken_weights(directory: Path) -> None:
    model = make_llama()
    model.model.layers[0].self_attn.k_proj.weight.data[0, 0] = float("nan")
    save(model, directory)


def quantised(directory: Path) -> None:
    save(make_llama(), directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (directory / "config.json").write_text(json.dumps(config))


# What makes a bad model in a directory, what the message must hold, and the commands that need no weights or none of it
# to be right, and so accept it.
MODELS: dict[str, tuple[Callable[[Path], Any], str, set[str]]] = {
    "encoder-decoder": (lambda d: T5Config(num_layers=1).save_pretrained(d), "is an encoder-decoder (t5)", set()),
    "encoder": (lambda d: bert(d, BertForMaskedLM), "BertForMaskedLM, not a causal language model", set()),
    "bare encoder": (lambda d: bert(d, BertModel), "is an encoder (bert without is_decoder)", set()),
    "encoder's configuration": (lambda d: bert(d, None), "is an encoder (bert without is_decoder)", set()),
    "images": (lambda d: CLIPConfig().save_pretrained(d), "(clip) is not a causal language model", set()),
    "NaN": (broken_weights, "NaN in model.layers.0.self_attn.k_proj.weight; get an intact", {"inspect"}),
    "another tokenizer": (
        lambda d: save(make_llama(vocab_size=200), d),
        "the model has 200 rows); give the tokenizer",
        {"inspect"},
    ),
    "no tokenizer": (lambda d: make_llama().save_pretrained(d), "holds no tokenizer", {"inspect"}),
    "no weights": (lambda d: make_llama().config.save_pretrained(d), "give the directory of the whole", {"inspect"}),
    "quantised": (quantised, "already quantised (gptq); give the unquantised model, or --dequantize", {"inspect"}),
    "no attention": (
        lambda d: save(MambaForCausalLM(MambaConfig(vocab_size=260, hidden_size=16, num_hidden_layers=1)), d),
        "MambaForCausalLM: no attention site",
        {"eval", "generate"},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_worked_on(name: str, workplace: Path, refused: Refused) -> None:
    make, message, accepting = MODELS[name]
    make(workplace / "model")
    for command in COMMANDS:
        if command not in accepting:
            assert message in refused(*command_line(command, "model"))


@pytest.mark.parametrize(
    ("model", "content", "message"),
    [
        ("./gone", None, "./gone does not exist; give a hub name, a model directory"),
        ("gone.gguf", None, "gone.gguf does not exist"),
        ("nobody/none", None, "could not be fetched from the Hugging Face hub"),
        ("", None, "no model is named"),
        (".", None, "has no config.json; give the directory"),
        ("model.txt", b"text", "neither a model directory nor a .gguf file"),
        ("model.gguf", b"no such format", "truncated or damaged, not a whole GGUF file; fetch it again"),
        ("model.gguf", b"GGUF\x03\x00\x00\x00" + b"\x01" * 40, "truncated or damaged, not a whole GGUF file"),
        ("config.json", b"{", "cannot read the configuration of config.json"),
    ],
)
def test_a_model_that_is_not_there(
    model: str, content: bytes | None, message: str, workplace: Path, refused: Refused
) -> None:
    if content is not None:
        (workplace / model).write_bytes(content)
    for command in COMMANDS:
        assert message in refused(*command_line(command, model))


def test_a_configuration_file_is_for_inspect_alone(saved_llama: Path, workplace: Path, refused: Refused) -> None:
    shutil.copy(saved_llama / "config.json", workplace)
    for command in COMMANDS[1:]:
        assert "which only inspect can work with; give the directory" in refused(*command_line(command, "config.json"))


def test_without_attention_there_is_no_cache_to_measure(workplace: Path, refused: Refused) -> None:
    MODELS["no attention"][0](workplace / "model")
    assert "no key-value cache" in refused(*command_line("eval", "model"))


def test_attention_that_is_not_supported_is_named(workplace: Path, refused: Refused) -> None:
    save(build("openai-gpt", vocab_size=260), workplace / "model")
    for command in ("inspect", "compile", "sweep"):
        message = refused(*command_line(command, "model"))
        assert "0." in message  # the module
        assert "modeling_openai.py:" in message
        assert "does not go through transformers' attention interface" in message
        assert "no module around it is given a cache" in message


def test_a_result_is_not_compiled_again(saved_llama: Path, workplace: Path, refused: Refused, capsys: Captured) -> None:
    answer(capsys, *command_line("compile", saved_llama))
    for command in ("inspect", "compile", "sweep"):
        arguments = ["elsewhere" if part == "out" else part for part in command_line(command, "./out")]
        message = refused(*arguments)
        assert "rewritten" in message
        assert "the model that it" in message


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.txt", b"", "a.txt holds no text"),
        ("a.txt", b" \n\n", "a.txt holds no text"),
        ("a.txt", bytes(range(256)), "is not UTF-8 text (byte 128); convert it"),
        ("a.txt", b"a\0b" * 2000, "is not text (NUL at character 1); give another file"),
        ("a.jsonl", bytes(range(128, 256)), "is not UTF-8 text"),
        ("a.jsonl", b'"fine"\n{oops\n', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"prompt": "x"}', "has no field text or messages"),
        ("a.parquet", b"PAR2", "cannot read a.parquet as parquet"),
        ("gone.txt", None, "gone.txt does not exist"),
        (".", None, "is a directory; give a text, jsonl, json or parquet file"),
        ("", None, "is named; give a text, jsonl, json or parquet file"),
    ],
)
def test_a_text_that_cannot_be_read(
    file: str, content: bytes | None, message: str, saved_llama: Path, workplace: Path, refused: Refused
) -> None:
    if content is not None:
        (workplace / file).write_bytes(content)
    for command in ("eval", "sweep"):
        assert message in refused(*command_line(command, saved_llama, file))
    (workplace / "long.txt").write_text("Only the calibration is bad. " * 100)
    assert message in refused(*command_line("sweep", saved_llama, file), "--text", "long.txt")


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(("text", "message"), [("", "holds no text"), ("Too short.", "is too short: 10 tokens")])
def test_calibration_text_that_is_too_short(
    text: str, message: str, saved_llama: Path, workplace: Path, refused: Refused
) -> None:
    (workplace / "short.txt").write_text(text)
    assert message in refused(*command_line("compile", saved_llama, "short.txt"))


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--windows", 0], "--windows"),
        (["--windows", "many"], "--windows"),
        (["--seq-len", 1], "--seq-len"),
        (["--seq-len", -5], "--seq-len"),
        (["--windows", 5000], "ask for at most 93 windows"),
        (["--seq-len", 256, "--windows", 40], "ask for at most 11 windows"),
        (["--seq-len", 257, "--windows", 1], "the model has 256 positions; ask for at most that"),
    ],
)
def test_windows_that_make_no_sense(options: list[object], message: str, saved_llama: Path, refused: Refused) -> None:
    for command in ("eval", "sweep"):
        assert message in refused(*command_line(command, saved_llama), *options)


def test_a_text_shorter_than_one_window(saved_llama: Path, workplace: Path, refused: Refused) -> None:
    (workplace / "short.txt").write_text("Too short.")
    message = refused(*command_line("eval", saved_llama, "short.txt"))
    assert "has 10 tokens, and 2 windows of 32 need 64; give a longer text, or ask for shorter windows" in message


def test_more_tokens_than_learned_positions(workplace: Path, refused: Refused) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
    save(GPT2LMHeadModel(config), workplace / "gpt2")
    assert "64 positions" in refused(*command_line("eval", "gpt2"), "--seq-len", 128)
    assert "ask for at most 62 new tokens" in refused("generate", "gpt2", "--prompt", "ab", "--max-new-tokens", 63)
    assert "shorten the prompt" in refused("generate", "gpt2", "--prompt", "ab" * 40, "--max-new-tokens", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", 0], "--max-new-tokens"),
        (["--max-new-tokens", -3], "--max-new-tokens"),
        (["--max-new-tokens", 500], "ask for at most 251 new tokens"),
        (["--prompt", ""], "the prompt is empty; give at least one word"),
        (["--temperature", -1], "--temperature"),
    ],
)
def test_a_generation_that_makes_no_sense(
    options: list[object], message: str, saved_llama: Path, refused: Refused
) -> None:
    assert message in refused(*command_line("generate", saved_llama), *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int4"], "unknown dtype 'int4'; give one of auto, float32"),
        (["--device", "nonsense"], "device 'nonsense' is not usable here; give cpu"),
        (["--device", "cuda:99"], "device 'cuda:99' is not usable here"),
        (["--device", "meta"], "device 'meta' is not usable here"),
        (["--seed", -1], "--seed"),
        (["--seed", 2**70], "--seed"),
        (["--revision", "main"], "a revision applies to hub names only"),
    ],
)
def test_loading_options_that_make_no_sense(
    options: list[object], message: str, saved_llama: Path, refused: Refused
) -> None:
    for command in COMMANDS[1:]:
        if command != "eval" or "--seed" not in options:
            assert message in refused(*command_line(command, saved_llama), *options)


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "magic"], "no target 'magic'; there is mla, gateswa"),
        (["--calibration-tokens", 1], "--calibration-tokens"),
        (["--alternations", -1], "--alternations"),
        (["--alternations", "some"], "--alternations"),
        (["-o", "notes.txt"], "notes.txt is a file; give a directory"),
        (["-o", "notes.txt/out"], "notes.txt is a file); give another output directory"),
        (["-o", "."], "is not empty; give another output directory, or --overwrite"),
    ],
)
def test_jobs_that_make_no_sense(options: list[object], message: str, saved_llama: Path, refused: Refused) -> None:
    for command in ("compile", "sweep"):
        assert message in refused(*command_line(command, saved_llama), *options)


def test_what_others_wrote_is_not_overwritten(saved_llama: Path, workplace: Path, refused: Refused) -> None:
    (workplace / "out").mkdir()
    (workplace / "out" / "thesis.tex").write_text("years of work")
    # Said before the model is loaded, which is not even there.
    assert "did not write" in refused(*command_line("compile", "./gone"), "--overwrite")


@pytest.mark.usefixtures("traced_once")
def test_a_budget_that_cannot_be_met_names_the_smallest(saved_llama: Path, refused: Refused) -> None:
    smallest = "need 0.0469; ask for at least that"  # a slot and a latent of one: 3 of 64 values
    assert smallest in refused(*command_line("compile", saved_llama), "--kv-budget", 0.01)
    assert smallest in refused(*command_line("sweep", saved_llama), "--kv-budgets", "0.5,0.01")


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("kept", [False, True])
def test_an_interrupt_while_saving_leaves_nothing_half_written(
    kept: bool, saved_llama: Path, workplace: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = workplace / "new" / "out"
    command = [*map(str, command_line("compile", saved_llama)), "-o", str(output), "--overwrite"]
    if kept:
        assert main(command) == 0
        capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in workplace.rglob("*")}

    def interrupt(*_: object, **__: object) -> None:
        assert len(list(workplace.rglob("model.safetensors"))) == 1 + kept  # the weights are written by now
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", interrupt)
    assert refusal(capsys, *command, code=130) == "attnedit: interrupted\n"
    after = {path: path.stat().st_mtime_ns for path in workplace.rglob("*")}
    assert {path: time for path, time in after.items() if path != workplace / "new"} == {
        path: time for path, time in before.items() if path != workplace / "new"
    }


@pytest.mark.usefixtures("traced_once")
def test_an_interrupt_between_the_renames_keeps_what_was_there(
    saved_llama: Path, workplace: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(capsys, *command_line("compile", saved_llama))
    before = {path: path.stat().st_mtime_ns for path in (workplace / "out").rglob("*")}
    rename = Path.rename

    def interrupt(self: Path, target: Path) -> Path:
        if target == workplace / "out" and self.parent == workplace:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    refusal(capsys, *command_line("compile", saved_llama), "--overwrite", code=130)
    assert {path: path.stat().st_mtime_ns for path in (workplace / "out").rglob("*")} == before
    assert sorted(path.name for path in workplace.iterdir()) == ["notes.txt", "out"]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_experts_are_inspected_without_weights(family: str, workplace: Path, capsys: Captured) -> None:
    build(family).config.save_pretrained(workplace / "model")
    facts = answer(capsys, "inspect", "model")
    assert facts["sites"] == FAMILIES[family].attention_layers
    assert facts["kv_values_per_token_layer"] > 0
