"""Which tests the installed transformers can run."""

import pytest

from gqa_kernels.integrations.transformers.versions import BATCHING, installed, release

needs_5 = pytest.mark.skipif(installed() < (5, 0), reason="needs transformers 5")
needs_batching = pytest.mark.skipif(
    installed() < release(BATCHING), reason=f"needs transformers {BATCHING}"
)
# The argument of generate and of models that takes a cache.
CACHE = "cache" if installed() >= (5, 24) else "past_key_values"
