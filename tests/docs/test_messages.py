"""The troubleshooting page explains every message that does not state its rule itself."""

import re

import pytest

from tools.messages import messages, page

from .pages import ROOT

TEXT = re.sub(r"\s+", " ", (ROOT / "docs/troubleshooting.md").read_text())
UNCLEAR = [message for message in messages() if not message.states_rule]


@pytest.mark.parametrize("message", UNCLEAR, ids=lambda m: f"{m.path}: {m.quote[:40]}")
def test_is_explained(message):
    assert message.quote in TEXT, (
        f"explain {message.text!r} in docs/troubleshooting.md, or state the rule: 'x must ..., got'"
    )


def test_the_list_has_messages_of_every_kind():
    text = page()
    assert "`head_map entries must lie in [0, …), got … at head …` | ValueError" in text
    assert "runs the eager reference" in text and "| warning |" in text
    assert len(messages()) > 400
