"""``python -m gqa_kernels.integrations.hf_kernels FOLDER``"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .repository import build


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the package as a kernel repository.")
    parser.add_argument("folder", type=Path, help="must not exist, or be empty")
    print(f"wrote {build(parser.parse_args(argv).folder)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
