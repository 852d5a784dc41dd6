"""Write docs/spec.schema.json, the published schema of spec files, from the nouns themselves.

python scripts/spec_schema.py
"""

from pathlib import Path

from demur.record import write_json
from demur.steering.spec_file import schema

if __name__ == "__main__":
    write_json(Path(__file__).parents[1] / "docs" / "spec.schema.json", schema())
