"""The tasks' metrics as modules of the `evaluate` library, which loads them from their folders without a network.

    import evaluate
    from trainers.metrics import metric_path

    metric = evaluate.load(metric_path("final_number"))
    metric.compute(predictions=["So it is 18."], references=["18"])  # {"accuracy": 1.0, "unparseable": 0}

Each reads and scores an answer by the same functions as the tasks do. `evaluate` is an extra of this package.
"""

from pathlib import Path

METRICS = ("exact_match", "final_number", "option_letter", "rouge_l", "yes_no")


def metric_path(name: str) -> str:
    """The folder of one of the metrics, for `evaluate.load`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; there are {', '.join(METRICS)}")
    return str(Path(__file__).parent / name)
