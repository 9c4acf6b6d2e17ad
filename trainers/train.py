"""Train a model from a recipe, measure it, and leave a complete run folder with its card.

    accelerate launch -m trainers.train recipes/quickstart.yaml
    accelerate launch -m trainers.train recipes/vanilla_transformer/strategyqa/small.yaml --data_dir path/to/strategyqa

`--help` lists every option. A run that was interrupted goes on with `--resume`, to the same end state.
"""

import contextlib
import json
import shlex
import sys
from collections.abc import Sequence

import torch
from accelerate import PartialState

from .arguments import Recipe, parse_recipe
from .command import explain, interruptible_alone, is_told, print_anything
from .distributed import on_every_process, on_main_process
from .errors import UserError
from .run import prepare_output_dir, say

BATCH_OPTION = "training.per_device_train_batch_size"


def run(recipe: Recipe, argv: Sequence[str]) -> None:
    """Train and evaluate one recipe; see the module's docstring for what is printed and written."""
    folder = recipe.output_dir
    task = on_every_process(lambda: recipe.kind.run.make_task(recipe.task))
    recipe.task = task.arguments
    with contextlib.ExitStack() as stack:
        if on_main_process(lambda: prepare_output_dir(recipe, stack)):
            say(f"{folder} is finished already; nothing to do")
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        else:
            training_run = on_every_process(lambda: recipe.kind.run(recipe, task))
            on_main_process(lambda: training_run.begin(argv))
            seconds = training_run.train()
            metrics = training_run.finish(seconds)
    say(f"\n{recipe.kind.run.results_table(metrics)}")
    say(f"\nrun folder  {folder}\nmodel card  {folder / 'README.md'}")
    say(f"next        python push_to_hub.py {shlex.quote(str(folder))} <user>/<name> --dry-run")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 on success, 2 for a mistake the user can mend, 130 for Ctrl-C.

    A single process takes SIGTERM like Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    speaks = True
    print_anything()
    try:
        with interruptible_alone():
            recipe = parse_recipe(argv, prog="python -m trainers.train")
            # From here on all processes of a run fail together, and one of them tells why.
            speaks = PartialState().is_main_process
            run(recipe, argv)
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume continues the run", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in argv or not is_told(error):
            raise
        if speaks or not isinstance(error, UserError):
            print(f"error: {explain(error, BATCH_OPTION)}", file=sys.stderr)
        return 2
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
