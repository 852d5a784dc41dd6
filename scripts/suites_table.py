"""Write the tables of docs/suites.md anew, from the suites and wrappers themselves.

python scripts/suites_table.py
"""

from pathlib import Path

from demur.data.suites.table import render
from demur.record import write_text

if __name__ == "__main__":
    page = Path(__file__).parents[1] / "docs" / "suites.md"
    write_text(page, render(page.read_text(encoding="utf-8")))
