"""The benchmarks' own machinery, and fast forms that stay faster than plain ones (by CPU time, with room to spare)."""

import json
import re
import sys

import pytest

from tests.benchmarks import __main__ as benchmarks


def test_results_become_a_page(tmp_path, monkeypatch):
    """Entries are added to the JSON file one by one; the page holds all of them."""
    monkeypatch.setitem(benchmarks.JOBS, "tracking", ["platform"])
    monkeypatch.setitem(benchmarks.JOBS, "kernels", ["this"])
    for name in ("tracking", "kernels"):
        options = ["--only", name, "--json", str(tmp_path / "all.json"), "--card", str(tmp_path / "card.md")]
        monkeypatch.setattr(sys, "argv", ["benchmarks", *options])
        benchmarks.main()
    results = json.loads((tmp_path / "all.json").read_text())
    assert results.keys() == {"tracking", "kernels"}
    page = (tmp_path / "card.md").read_text()
    assert "`python -m this`" in page
    assert "Beautiful is better than ugly" in page
    assert page.index("## Internals tracking") < page.index("## Attention kernels")


def test_unknown_entry(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "couplings"])
    with pytest.raises(SystemExit):
        benchmarks.main()
    assert "unknown entry 'couplings'" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize(
    ("command", "pattern", "least"),
    [
        (["tests.benchmarks.bench_connection_transformer", "scalar", "--rounds", "3"], r"([\d.]+)x", 20.0),
        (["tests.benchmarks.bench_in_context_transformer", "generator", "--rounds", "3"], r"([\d.]+)x", 20.0),
    ],
)
def test_fast_forms_stay_fast(monkeypatch, command, pattern, least):
    monkeypatch.setitem(benchmarks.JOBS, "probe", command)
    output = benchmarks.run("probe")["output"]
    found = re.search(pattern, output)
    assert found, output
    assert float(found[1]) >= least, output
