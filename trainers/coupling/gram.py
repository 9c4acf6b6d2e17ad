"""Inner products of per-piece gradients, without ever holding the gradients of all pieces.

    <G_i, G_j> = Σ_{t in i, s in j} (left_t · left_s) (right_t · right_s)

Two exact ways, whichever takes fewer multiplications: by tokens (the formula as it stands, a block of pieces against a
block), or by materialising G for all pieces, a slice of its rows at a time.
"""

import torch

from .capture import LayerTerms, one_hot

# Sizes of the temporary arrays; large enough for full speed, small beside a model.
BLOCK_TOKENS = 256
SLICE_ELEMENTS = 2**23


def layer_gram(
    terms: LayerTerms,
    rows: int,
    count: int,
    way: str | None = None,
    other: LayerTerms | None = None,
    other_count: int = 0,
) -> torch.Tensor:
    """Gram matrix of the gradients of one weight and its biases, of one set of pieces or between two.

    Args:
        terms: the terms of all pieces, tokens sorted by piece.
        rows: rows of the weight.
        count: number of pieces.
        way: `"tokens"` or `"materialise"`; default is the cheaper one by count.
        other: the terms of a second set of pieces, whose inner products with the first are wanted.
        other_count: number of pieces of that set.

    Returns:
        `torch.float64` of shape `(count, count)`, or `(count, other_count)`, on the CPU. Products are summed in the
        precision of the terms (float32 at least) within a block, and blocks in float64.
    """
    columns = terms.right.shape[-1]
    second = None if other is None else (len(other.owner), other_count)
    way = way or cheaper_way(len(terms.owner), count, rows, columns, second)
    # A unit vector per token is cheap to multiply and dear to materialise.
    by_tokens = way == "tokens" or terms.left.dim() == 1
    gram = (_by_tokens if by_tokens else _by_slices)(terms, rows, count, other, other_count)
    for bias, other_bias in zip(terms.biases, (other or terms).biases, strict=True):
        gram += (bias.double() @ other_bias.double().T).cpu()
    return gram


def squared_norms(terms: LayerTerms, rows: int, count: int) -> torch.Tensor:
    """|G_i|² of one weight and its biases for each piece, `torch.float64` of shape `(count,)`, on the CPU."""
    counts = torch.bincount(terms.owner, minlength=count).tolist()
    lefts, rights = terms.left.split(counts), terms.right.split(counts)
    found = []
    for left, right in zip(lefts, rights, strict=True):
        dense, right = _dense(left, rows, _wide_dtype(right)), _widen(right)
        found.append(((dense @ dense.T) * (right @ right.T)).sum(dtype=torch.float64))
    total = torch.stack(found).cpu()
    for bias in terms.biases:
        total += bias.double().square().sum(-1).cpu()
    return total


def cheaper_way(tokens: int, count: int, rows: int, columns: int, other: tuple[int, int] | None = None) -> str:
    """The way with fewer multiplications, for `tokens` tokens of `count` pieces and a weight of `rows` x `columns`.

    Args:
        other: tokens and pieces of the second set, where inner products between two sets are wanted.
    """
    if other is None:
        by_tokens = tokens * tokens * (rows + columns) / 2
        by_slices = tokens * rows * columns + count * count * rows * columns
    else:
        by_tokens = tokens * other[0] * (rows + columns)
        by_slices = (tokens + other[0]) * rows * columns + count * other[1] * rows * columns
    return "tokens" if by_tokens <= by_slices else "materialise"


def _by_tokens(terms: LayerTerms, rows: int, count: int, other: LayerTerms | None, other_count: int) -> torch.Tensor:
    second = other or terms
    right, other_right = _widen(terms.right), _widen(second.right)
    blocks = _blocks(torch.bincount(terms.owner, minlength=count).tolist(), BLOCK_TOKENS)
    width = count if other is None else other_count
    other_blocks = blocks
    if other is not None:
        other_blocks = _blocks(torch.bincount(other.owner, minlength=width).tolist(), BLOCK_TOKENS)
    gram = torch.zeros(count, width, dtype=torch.float64)
    for i, (first, last, start, end) in enumerate(blocks):
        left_i = _dense(terms.left[start:end], rows, right.dtype)
        for other_first, other_last, other_start, other_end in other_blocks[i if other is None else 0 :]:
            left_j = _dense(second.left[other_start:other_end], rows, right.dtype)
            products = left_i @ left_j.T
            products *= right[start:end] @ other_right[other_start:other_end].T
            # Sum over the tokens of each piece: rows first, then columns, in float64.
            partial = products.new_zeros(last - first, other_end - other_start, dtype=torch.float64)
            partial.index_add_(0, terms.owner[start:end] - first, products.double())
            summed = partial.new_zeros(other_last - other_first, last - first)
            summed.index_add_(0, second.owner[other_start:other_end] - other_first, partial.T.contiguous())
            summed = summed.cpu()
            gram[first:last, other_first:other_last] = summed.T
            if other is None:
                gram[other_first:other_last, first:last] = summed
    return gram


def _by_slices(terms: LayerTerms, rows: int, count: int, other: LayerTerms | None, other_count: int) -> torch.Tensor:
    width = count if other is None else other_count
    columns = terms.right.shape[-1]
    height = min(rows, max(1, SLICE_ELEMENTS // (max(count, width) * columns)))
    sides = [_Slices(terms, count, height)] + ([] if other is None else [_Slices(other, other_count, height)])
    gram = torch.zeros(count, width, dtype=torch.float64, device=terms.right.device)
    for start in range(0, rows, height):
        flat = [side.take(start, min(height, rows - start)) for side in sides]
        gram += (flat[0] @ flat[-1].T).double()
    return gram.cpu()


class _Slices:
    """Some rows at a time of the gradients of all pieces."""

    def __init__(self, terms: LayerTerms, count: int, height: int):
        counts = torch.bincount(terms.owner, minlength=count).tolist()
        self.lefts, self.rights = terms.left.split(counts), terms.right.split(counts)
        shape = (count, height, terms.right.shape[-1])
        self.gradients = torch.empty(shape, dtype=_wide_dtype(terms.right), device=terms.right.device)

    def take(self, start: int, height: int) -> torch.Tensor:
        """Rows `start` to `start + height` of each gradient, flattened, `(count, height * columns)`."""
        part = self.gradients[:, :height]
        for index, (left, right) in enumerate(zip(self.lefts, self.rights, strict=True)):
            torch.matmul(_widen(left[:, start : start + height]).T, _widen(right), out=part[index])
        return part.reshape(len(part), -1)


def _blocks(counts: list[int], most: int) -> list[tuple[int, int, int, int]]:
    """Runs of pieces with at most `most` tokens (one piece may have more): (first, last, first token, last token)."""
    blocks, first, start, tokens = [], 0, 0, 0
    for index, count in enumerate(counts):
        if tokens and tokens + count > most:
            blocks.append((first, index, start, start + tokens))
            first, start, tokens = index, start + tokens, 0
        tokens += count
    blocks.append((first, len(counts), start, start + tokens))
    return blocks


def _dense(left: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
    return one_hot(left, rows, dtype) if left.dim() == 1 else left.to(dtype)


def _wide_dtype(values: torch.Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _widen(values: torch.Tensor) -> torch.Tensor:
    return values.to(_wide_dtype(values))
