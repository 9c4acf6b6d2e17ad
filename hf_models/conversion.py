"""What the converters of all architectures share: reading an original's files, writing the folder, and the command.

Only a converter's command imports this: all else in an architecture's folder, the converter's mappings too, runs alone.
"""

import argparse
import json
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel


def read_config(path: Path) -> dict[str, Any]:
    """Reads the original's settings; raises `ValueError` if the file is not a JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError("must hold a JSON object")
    return config


def read_tensors(path: Path, permitted_types: Sequence[Any] = ()) -> dict[str, torch.Tensor]:
    """
    Reads a safetensors file or, without running any code in it, a PyTorch state dict.

    Args:
        path (`Path`): `.safetensors` file, or a PyTorch file under any other suffix, where the state dict may lie under
            `model_state_dict` of a training checkpoint.
        permitted_types (`Sequence`, *optional*): Harmless types that a checkpoint holds besides tensors and plain
            Python values, as `torch.serialization.safe_globals` takes them.

    Raises:
        ValueError: in one line, if it is neither.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(list(permitted_types)):
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"cannot be read as weights: {str(error).splitlines()[0]}") from error
    if isinstance(tensors, dict) and isinstance(tensors.get("model_state_dict"), dict):
        tensors = tensors["model_state_dict"]
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError("must hold a state dict, that is names with tensors")
    return tensors


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Puts the file before the message of a `ValueError` raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def convert_files(
    config_path: str | Path,
    weights_path: str | Path,
    output_dir: str | Path,
    make_config: Callable[[dict[str, Any]], PreTrainedConfig],
    make_model: Callable[[dict[str, torch.Tensor], Any], PreTrainedModel],
    permitted_types: Sequence[Any] = (),
) -> None:
    """
    Converts the original's files and writes `output_dir` in one step.

    Args:
        config_path (`str` or `Path`): JSON file with the original's settings.
        weights_path (`str` or `Path`): `.safetensors` file, or PyTorch state dict under any other suffix.
        output_dir (`str` or `Path`): Folder to write; it must not exist yet or be empty.
        make_config (`Callable`): From the original's settings to ours; its `ValueError`s are about the settings.
        make_model (`Callable`): From the original's tensors and our configuration to a model with these weights; its
            `ValueError`s are about the weights.
        permitted_types (`Sequence`, *optional*): See [`read_tensors`].

    Raises:
        ValueError: in one line, the file and what is wrong with it.
    """
    config_path, weights_path, output_dir = Path(config_path), Path(weights_path), Path(output_dir)
    with errors_name(output_dir):
        if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
            raise ValueError("exists already and is not an empty folder")
    with errors_name(config_path):
        config = make_config(read_config(config_path))
    with errors_name(weights_path):
        model = make_model(read_tensors(weights_path, permitted_types), config)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}.") as scratch:
        finished = Path(scratch) / output_dir.name
        model.save_pretrained(finished)
        os.replace(finished, output_dir)


def convert_command(
    make_config: Callable[[dict[str, Any]], PreTrainedConfig],
    make_model: Callable[[dict[str, torch.Tensor], Any], PreTrainedModel],
    module: str,
    description: str,
    arguments: list[str] | None = None,
    config_help: str = "the original's settings",
    permitted_types: Sequence[Any] = (),
) -> int:
    """
    The command of a converter.

    Args:
        make_config, make_model, permitted_types: See [`convert_files`].
        module (`str`): The converter's full name, for the usage line.
        description (`str`): What it converts, in a sentence.
        arguments (`list[str]`, *optional*): The command line; by default that of the process.
        config_help (`str`, *optional*): What CONFIG.json holds.

    Returns:
        `int`: The exit code, 0 or 2; a mistake in the input is reported in one line.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("config", metavar="CONFIG.json", help=config_help)
    parser.add_argument("weights", metavar="WEIGHTS", help="safetensors file, or PyTorch state dict")
    parser.add_argument("output_dir", metavar="OUT_DIR", help="folder to write; must not exist or be empty")
    options = parser.parse_args(arguments)
    try:
        convert_files(options.config, options.weights, options.output_dir, make_config, make_model, permitted_types)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
