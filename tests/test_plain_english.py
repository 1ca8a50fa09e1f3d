"""Plain English: phrases that the project does not use, and what to write instead.

CONTRIBUTING.md has the rule. These phrases came up most often.
"""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = {".py", ".md", ".h", ".cuh", ".cpp", ".cu", ".sh", ".toml", ".yml", ".cff", ".txt"}
INSTEAD = {  # pattern -> the field's word
    r"ask(s|ed|ing)? for ahead": "prefetch",
    r"(short|long) way of": "fast path, general path",
    r"(go|goes|take|takes) the (short|long) way": "take the fast or general path",
    r"gives? (heads|them|it|the query heads|query heads) out": "assign",
    r"given out": "assigned",
    r"hand(s|ed|ing)? out": "assign, allocate",
    r"anew": "again",
    r"as ever": "unchanged, or nothing",
    r"as everywhere": "nothing",
    r"mend(s|ed|ing)?": "patch, fix, work around",
    r"tells? each other": "exchange",
    r"(is|are|was|were) told": "is passed",
    r"in the place of": "instead of",
    r"beforehand": "before, in advance",
    r"stands? for": "represent",
    r"(make|makes|made) ready": "prepare, load",
    r"widened cop(y|ies)": "dequantised copy",
    r"nothing is waited for": "nothing synchronises",
    r"where (packed|wanted|asked for)": "if packed",
    r"the turn of": "the exchange of",
}
BANNED = re.compile(r"\b(?:" + "|".join(f"(?:{p})" for p in INSTEAD) + r")\b", re.IGNORECASE)


def files():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("needs a git checkout")
    paths = (ROOT / name for name in listed.stdout.split("\0") if name)
    return [p for p in paths if p.suffix in TEXT and p != Path(__file__) and p.is_file()]


def faults(text):
    """Line number and phrase of each; a phrase may run over the end of a line."""
    prose = re.sub(r"\n\s*(?:#|//|\*)?\s*", lambda m: " " * len(m[0]), text)
    prose = re.sub(r" +", lambda m: " " + "\0" * (len(m[0]) - 1), prose)
    compact = prose.replace("\0", "")
    offsets = [i for i, c in enumerate(prose) if c != "\0"]
    return [(text.count("\n", 0, offsets[m.start()]) + 1, m[0]) for m in BANNED.finditer(compact)]


def test_no_banned_phrase():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {phrase!r}"
        for path in files()
        for line, phrase in faults(path.read_text(encoding="utf-8"))
    ]
    assert not found, "plain English, please (see INSTEAD above):\n" + "\n".join(found)


def test_phrases_are_found():
    assert faults("a\n# compiled\n# as   ever, so") == [(3, "as ever")]
    assert faults("keys in the\n    place of values") == [(1, "in the place of")]
    assert faults("recommended; amended; whereas given; stand forward") == []
    for pattern in INSTEAD:
        assert not re.search(r"\\b", pattern)
