"""Models that think in ticks: how they are trained, measured, watched and drawn, and what they are compared with.

| module | what |
| --- | --- |
| `run` | a run of the training command, from data to run folder |
| `trainer` | `ThoughtTrainer`: the losses over ticks |
| `evaluation` | accuracy over ticks, at the most certain tick, calibration, stopping at a certainty |
| `watching` | what goes on inside while a few examples are thought about |
| `figures` | pictures and animations of it |
| `baselines` | an LSTM in ticks and a feed-forward network on the same encoded input |
"""
