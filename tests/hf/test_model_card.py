"""Model cards: in every directory, with the licence of the source."""

from __future__ import annotations

from pathlib import Path

import gguf
from compiled import half, tokens
from huggingface_hub import metadata_load
from tiny_llama import make_llama

import attnedit
from attnedit.compiler.model_io.licenses import source_license
from attnedit.compiler.model_io.models import load_source
from attnedit.targets.runtime.hf import model_card


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
        assert "Engines that were tried with this form: vLLM" in text
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
    assert "base_model: someone/a-model" in text
    assert "license" not in text.split("---")[1]
