"""Where an analysis keeps what it has finished: in memory, or as files that outlive the process.

On disk each part is one safetensors file that appears whole or not at all, and knows its checksum. A later run of the
same analysis finds the parts that are there and undamaged, and computes the rest; several processes share the parts of
one folder.
"""

import hashlib
import itertools
import json
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import UserError
from ..files import remove_leftovers, replacing
from .capture import LayerTerms

Parts = Mapping[str, torch.Tensor]
CHECKSUM = "sha256"


class Store(ABC):
    """Named groups of tensors."""

    @abstractmethod
    def __contains__(self, name: str) -> bool:
        """Whether a part is there, whole."""

    @abstractmethod
    def save(self, name: str, tensors: Parts) -> None:
        """Keep a part."""

    @abstractmethod
    @contextmanager
    def opened(self, names: Sequence[str]) -> Iterator[list[Parts]]:
        """Parts to read from, in the order of their names."""


class MemoryStore(Store):
    """Parts that live as long as the store."""

    def __init__(self) -> None:
        self._parts: dict[str, Parts] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def save(self, name: str, tensors: Parts) -> None:
        self._parts[name] = tensors

    @contextmanager
    def opened(self, names: Sequence[str]) -> Iterator[list[Parts]]:
        yield [self._parts[name] for name in names]


class DiskStore(Store):
    """Parts as files of a folder.

    Args:
        folder: made if it does not exist.

    Raises:
        UserError: if the folder cannot be made.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._known: set[str] = set()  # parts that this process has written or has checked
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot keep blocks there: {error.strerror}") from error

    def __contains__(self, name: str) -> bool:
        path = self._path(name)
        if not path.exists():
            return False
        if name not in self._known:
            try:
                with safe_open(path, "pt") as file:
                    noted, found = (file.metadata() or {}).get(CHECKSUM), _checksum(_FilePart(file))
            except (SafetensorError, OSError):  # shorter than its header says
                noted = found = None
            if noted is None or noted != found:
                print(f"blocks   {path} is damaged, and is computed again", file=sys.stderr)
                path.unlink(missing_ok=True)
                return False
            self._known.add(name)
        return True

    def save(self, name: str, tensors: Parts) -> None:
        """Keep a part.

        Raises:
            UserError: if it cannot be written; what was finished before is kept.
        """
        path = self._path(name)
        try:
            kept = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            with replacing(path) as aside:
                save_file(kept, aside, {CHECKSUM: _checksum(kept)})
            self._known.add(name)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; the blocks finished before are kept, and the same command "
                "goes on from them"
            ) from error

    @contextmanager
    def opened(self, names: Sequence[str]) -> Iterator[list[Parts]]:
        with ExitStack() as stack:
            yield [_FilePart(stack.enter_context(safe_open(self._path(name), "pt"))) for name in names]

    def remove_leftovers(self) -> None:
        """Delete what a killed process was writing. No other process may be at work in the folder."""
        remove_leftovers(self.folder)

    def remove(self) -> None:
        """Delete the folder and all parts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


class _FilePart(Mapping[str, torch.Tensor]):
    """A file's tensors, each read when it is asked for."""

    def __init__(self, file: Any):
        self._file = file

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())

    def __contains__(self, key: object) -> bool:
        return key in self._file.keys()  # noqa: SIM118 - the file itself is no container


def _checksum(part: Parts) -> str:
    """SHA-256 over the names and contents of a part's tensors."""
    digest = hashlib.sha256()
    for name in sorted(part):
        digest.update(name.encode())
        digest.update(part[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pack(index: int, terms: LayerTerms, prefix: str = "") -> dict[str, torch.Tensor]:
    """The terms of layer number `index` as named tensors."""
    named = {"left": terms.left, "right": terms.right, "owner": terms.owner}
    named |= {f"bias.{place}": bias for place, bias in enumerate(terms.biases)}
    return {f"{prefix}{index}.{name}": tensor for name, tensor in named.items()}


def unpack(index: int, part: Parts, prefix: str = "") -> LayerTerms:
    """What `pack` named."""
    start = f"{prefix}{index}."
    biases = itertools.takewhile(part.__contains__, (f"{start}bias.{place}" for place in itertools.count()))
    return LayerTerms(
        part[f"{start}left"], part[f"{start}right"], part[f"{start}owner"], [part[name] for name in biases]
    )


def joined(chunks: Sequence[LayerTerms], sizes: Sequence[int]) -> LayerTerms:
    """The terms of several sets of pieces as one set; `sizes` are their numbers of pieces."""
    starts = torch.tensor([0, *sizes]).cumsum(0)[:-1].tolist()
    return LayerTerms(
        torch.cat([chunk.left for chunk in chunks]),
        torch.cat([chunk.right for chunk in chunks]),
        torch.cat([chunk.owner + start for chunk, start in zip(chunks, starts, strict=True)]),
        [torch.cat(parts) for parts in zip(*(chunk.biases for chunk in chunks), strict=True)],
    )


def fingerprint(model: nn.Module, facts: dict[str, Any]) -> str:
    """Sixteen digits that differ if the weights or any of the facts differ.

    Of each tensor the sum in float64 and some thousand values count.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        values = tensor.detach().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta" and tensor.dtype != torch.bool:
            digest.update(values[:: max(1, len(values) // 4096)].double().cpu().numpy().tobytes())
            digest.update(values.sum(dtype=torch.float64).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
