"""Completion in the shell: the real bash function that the command prints, asked for names."""

import shutil
import subprocess
import sys

import pytest

from bitladder.cli.completion import level_names, model_names, planned_names
from bitladder.levels import parse_level

BASH = shutil.which("bash")


def completed(folder, *words):
    """What bash offers for the last of these words."""
    command = folder / "bitladder"
    command.write_text(f"#!{sys.executable}\nfrom bitladder.cli import main\nmain()\n")
    command.chmod(0o755)
    line = " ".join(f"'{word}'" for word in ("bitladder", *words))
    script = f"""
        PATH={folder}:$PATH
        eval "$(_BITLADDER_COMPLETE=source_bash bitladder)"
        COMP_WORDS=({line}); COMP_CWORD={len(words)}; COMPREPLY=()
        _bitladder_completion bitladder
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    return subprocess.run([BASH, "-c", script], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_bash_completes_verbs_levels_and_models(tmp_path):
    assert completed(tmp_path, "quantize", "m.gguf", "--to", "Q8_0,q4_k") == ["Q8_0,q4_k_m", "Q8_0,q4_k_s"]
    assert completed(tmp_path, "run", "smol") == ["smollm2-135m"]
    assert completed(tmp_path, "cle") == ["clean"]
    assert completed(tmp_path, "run", "./no") == []  # bash then offers files


def test_levels_in_any_case_and_none_twice():
    assert level_names("Q5_K") == ["Q5_K_M", "Q5_K_S"] and level_names("q5_k") == ["q5_k_m", "q5_k_s"]
    assert level_names("Q5_K_M,Q5_K") == ["Q5_K_M,Q5_K_S"]
    assert level_names("GPTQ") == ["GPTQ-4bit-g128", "GPTQ-4bit-g64"]
    assert all(parse_level(name) for name in level_names(""))
    assert level_names("nothing") == [] and len(level_names("")) > 20


def test_models():
    assert model_names("smol") == ["smollm2-135m"] and model_names("./x") == []
    assert "Qwen3-14B" in planned_names("Qwen3-14") and "qwen3-14b" in planned_names("qwen3-14")
    assert len(planned_names("")) == len(set(map(str.lower, planned_names(""))))


def test_a_damaged_catalogue_of_the_user_is_no_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLADDER_DATA", str(tmp_path))
    (tmp_path / "models.yaml").write_text("- nonsense")
    assert planned_names("smol") == ["smollm2-135m"]
