"""The two texts."""

import pytest

from gqa_kernels.reporting.errors import UsageError
from gqa_kernels.samples import text
from tests.samples.stand_ins import ByteTokenizer


class TestTexts:
    def test_are_long_enough_and_plain(self):
        for words in (text.calibration_text(), text.evaluation_text()):
            assert len(words) > 25_000
            assert "\n" not in words

    def test_rows_are_consecutive(self):
        rows = text.rows(ByteTokenizer(), "abcdefgh", (2, 3))
        assert [ByteTokenizer().decode(row.tolist()) for row in rows] == ["abc", "def"]

    def test_too_short(self):
        with pytest.raises(UsageError, match="must have 10 tokens, got 3"):
            text.rows(ByteTokenizer(), "abc", (2, 5))
