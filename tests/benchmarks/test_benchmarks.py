"""The benchmarks' own machinery, and fast forms that stay faster than plain ones (by CPU time, with room to spare)."""

import json
import sys

import pytest

from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks import measuring


def test_results_become_a_page(tmp_path, monkeypatch):
    """Entries are added to the JSON file one by one; the page holds all of them."""
    monkeypatch.setattr(benchmarks, "JOBS", {"tracking": ["platform"], "kernels": ["this"]})
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


def test_page_is_drawn_again_without_measuring(tmp_path, monkeypatch):
    entry = {
        "command": "python -m this",
        "output": "one line\n  below it",
        "figures": [{"text": "one line"}, {"text": "  below it"}],
        "seconds": 3,
        "date": "2026-01-01",
        "load_at_start": 0.5,
        "machine": {"processor": "some", "python": "3", "torch": "2", "transformers": "5"},
    }
    results, page = tmp_path / "all.json", tmp_path / "card.md"
    results.write_text(json.dumps({"memory": entry}))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "--json", str(results), "--card", str(page)])
    benchmarks.main()
    assert "\n\n- one line\n  - below it\n\n2026-01-01; some;" in page.read_text()
    assert json.loads(results.read_text()) == {"memory": entry}


def test_unknown_entry(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "couplings"])
    with pytest.raises(SystemExit):
        benchmarks.main()
    assert "unknown entry 'couplings'" in capsys.readouterr().err


def test_figures_reach_the_json_file(monkeypatch):
    """Each line of a benchmark leaves its figures beside its text."""
    command = ["tests.benchmarks.bench_tracking", "--size", "tutorial", "--batch", "2", "--rounds", "1"]
    monkeypatch.setitem(benchmarks.JOBS, "probe", command)
    entry = benchmarks.run("probe")
    assert [figures["text"] for figures in entry["figures"]] == entry["output"].splitlines()
    assert entry["figures"][0]["seconds"].keys() == {"no tracker", "not due", "tracked", "tracked with probe"}
    assert {"hooks_when_not_due": 0}.items() <= entry["figures"][4].items()


def test_ratios_are_of_medians_with_the_range_of_rounds(capsys, monkeypatch, tmp_path):
    comparison = measuring.Comparison({"slow": [4.0, 9.0, 6.0], "fast": [2.0, 3.0, 1.0]})
    assert comparison.ratio("fast", "slow") == (3.0, 2.0, 6.0)
    monkeypatch.setenv(measuring.RECORDS, str(tmp_path / "records"))
    measuring.note_speed("sorting", comparison, "slow")
    measuring.note_memory("sorting", {"slow": 8 * 2**20, "fast": 2**21}, "slow")
    speed, memory = capsys.readouterr().out.splitlines()
    assert speed == "sorting: slow 6.00 s, fast 2.00 s (3.00x, 2.00 to 6.00)"
    assert memory == "sorting: slow 8 MiB, fast 2 MiB (0.25 of it)"
    records = [json.loads(line) for line in (tmp_path / "records").read_text().splitlines()]
    assert [record["text"] for record in records] == [speed, memory]
    assert records[0]["ratios"] == {"fast": [3.0, 2.0, 6.0]}


def test_forms_take_turns():
    calls = []
    comparison = measuring.interleaved(
        {name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2, repeats={"b": 2}
    )
    assert "".join(calls) == "abb" * 3
    assert {name: len(values) for name, values in comparison.seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_slope_is_the_power(power):
    sizes = [10.0, 20.0, 50.0]
    assert measuring.slope(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)


@pytest.mark.parametrize(("value", "text"), [(0.0123456, "0.0123"), (1.5, "1.50"), (236.4, "236"), (0.0, "0")])
def test_three_digits(value, text):
    assert measuring.significant(value) == text


def test_peak_of_an_allocation():
    peak = measuring.peak_of(lambda: bytearray(b"x") * (64 * 2**20))
    assert 60 * 2**20 < peak < 160 * 2**20


GUARDS = {
    "connection": (["tests.benchmarks.bench_connection_transformer", "quick", "scalar"], {"plain": 2.5, "sampled": 20}),
    "ticks": (["tests.benchmarks.bench_continuous_thought_machine", "parity"], {"plain": 2.5}),
    "in-context": (["tests.benchmarks.bench_in_context_transformer", "step", "generator"], {"dense": 2, "loop": 8}),
    "coupling": (
        ["tests.benchmarks.bench_coupling", "--model", "tiny_llama", "--pieces", "64", "--forms", "plain,exact"],
        {"plain": 2.0},
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", GUARDS)
def test_fast_forms_stay_fast(monkeypatch, name):
    """Ratios only, with room for a busy machine; each line of a benchmark that compares with a bound's form."""
    command, bounds = GUARDS[name]
    rounds = "--repeats" if name == "coupling" else "--rounds"
    monkeypatch.setitem(benchmarks.JOBS, "probe", [*command, rounds, "1"])
    seen = set()
    for figures in benchmarks.run("probe")["figures"]:
        for form, (ratio, *_) in figures.get("ratios", {}).items():
            bound = bounds.get(figures["baseline"])
            if bound is not None and form in ("fast", "sparse", "exact", "vectorised"):
                assert ratio >= bound, figures["text"]
                seen.add(figures["baseline"])
    assert seen == bounds.keys()
