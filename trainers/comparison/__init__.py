"""Many runs of the training command side by side: planned from one recipe, run one by one, read into one result.

| module | what |
|---|---|
| `plan` | a comparison's recipe -> its cells (model, task, training size, seed), each a recipe of its own |
| `matching` | configurations with as many parameters as another's, checked before anything is trained |
| `cells` | runs cells as processes: resumable, shared among several workers, failures kept apart |
| `cost` | multiply-adds and latency of a finished run |
| `results` | run folders -> `comparison.json` |
| `tables`, `figures` | CSV, LaTeX and pictures, drawn from that file |
"""
