"""vLLM after a weight sync against the model's own forward pass, for a tiny model of each family.

All families, about ten minutes on two cores:

    python -m benchmarks.campaigns.vllm_families

Some of them, added to the table:

    python -m benchmarks.campaigns.vllm_families gemma2 mixtral

The table has the largest log-prob difference to the float32 forward pass of transformers, or the
reason why there is none. The models have random weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tests.support.model_families import FAMILIES
from tests.support.vllm_comparison import in_a_process

TABLE = Path(__file__).resolve().parents[2] / "docs" / "data" / "vllm_families.json"


def main() -> None:
    """Compare the requested families and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--table", type=Path, default=TABLE)
    arguments = parser.parse_args()

    for family in arguments.families:
        result = in_a_process(family)
        table = json.loads(arguments.table.read_text()) if arguments.table.is_file() else {}
        table[family] = result
        arguments.table.parent.mkdir(parents=True, exist_ok=True)
        arguments.table.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
        print(family, result, flush=True)


if __name__ == "__main__":
    main()
