"""Models that learn from their prompt: how they are trained, measured and drawn.

| module | what |
| --- | --- |
| `run` | a run of the training command, from data to run folder |
| `trainer` | `InContextTrainer`: prompts made as they are used, with a curriculum |
| `evaluation` | error against the number of examples, accuracy by path length, baselines, unusual prompts |
| `figures` | curves and masks; `python -m trainers.in_context.figures` draws the masks alone |
"""
