"""The scaling page shows what its script computes."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "scaling.py"))


def test_the_page_has_the_table_that_the_script_prints():
    found = SCRIPT["rows"]()
    assert SCRIPT["table"](found) in (ROOT / "docs" / "scaling.md").read_text()
    strong = [row for row in found if row.scaling == "strong"]
    assert all(row.interleaved_s < row.one_f_one_b_s for row in strong)


def test_the_picture_can_be_drawn(tmp_path):
    SCRIPT["draw"](SCRIPT["rows"](), str(tmp_path / "scaling.png"))
    assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"
