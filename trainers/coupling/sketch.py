"""A few thousand numbers per piece whose inner products estimate those of the gradients.

TensorSketch (Pham and Pagh 2013, "Fast and scalable polynomial kernels via explicit feature maps", KDD): a count-sketch
of left_t rightᵀ_t, whose bucket is (h(row) + h'(column)) mod D and whose sign is s(row) s'(column), is the circular
convolution of the count-sketches of left_t and right_t, hence a product of their Fourier transforms. Sketches of tokens
and of layers, each layer with hashes of its own, add up to one vector. The inner product of two such vectors estimates
<g_i, g_j> without bias, with a standard error of about |g_i| |g_j| / √D.
"""

from collections.abc import Sequence

import torch

from .capture import LayerTerms
from .layers import TargetLayer

# Tokens transformed at a time; bounds the temporary arrays.
CHUNK_TOKENS = 256


class TensorSketch:
    """Sketches gradients that are given by the terms of each layer.

    Args:
        layers: target layers, in the order in which `sketch` gets their terms.
        size: D, numbers per sketch.
        seed: of hashes and signs; sketches of different seeds must not be compared.

    Raises:
        ValueError: if `size` is below 2.
    """

    def __init__(self, layers: Sequence[TargetLayer], size: int, seed: int = 0):
        if size < 2:
            raise ValueError(f"a sketch of {size} numbers: it must have at least 2")
        self.size = size
        generator = torch.Generator().manual_seed(seed)

        def hashes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
            buckets = torch.randint(0, size, (count,), generator=generator)
            return buckets, torch.randint(0, 2, (count,), generator=generator) * 2 - 1

        self.layers = [
            (hashes(layer.rows), hashes(layer.columns), [hashes(bias.numel()) for bias in layer.biases])
            for layer in layers
        ]

    def sketch(self, terms: Sequence[LayerTerms], count: int) -> torch.Tensor:
        """Sketches of `count` pieces, `(count, size)`, on the CPU; float64 for terms of that type, else float32.

        Args:
            terms: for each layer the terms of the pieces, as the layers were given.
        """
        dtype = torch.float64 if terms[0].right.dtype == torch.float64 else torch.float32
        complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
        spectrum = torch.zeros(count, self.size // 2 + 1, dtype=complex_dtype)
        direct = torch.zeros(count, self.size, dtype=dtype)
        for layer, (of_rows, of_columns, of_biases) in zip(terms, self.layers, strict=True):
            left, right, owner = layer.left.cpu(), layer.right.cpu().to(dtype), layer.owner.cpu()
            for start in range(0, len(owner), CHUNK_TOKENS):
                here = slice(start, start + CHUNK_TOKENS)
                product = torch.fft.rfft(self._count_sketch(left[here], of_rows, dtype))
                product *= torch.fft.rfft(self._count_sketch(right[here], of_columns, dtype))
                spectrum.index_add_(0, owner[here], product)
            # Terms without biases leave their hashes unused.
            for bias, of_bias in zip(layer.biases, of_biases, strict=False):
                direct += self._count_sketch(bias.cpu(), of_bias, dtype)
        return torch.fft.irfft(spectrum, n=self.size) + direct

    def _count_sketch(
        self, values: torch.Tensor, hashes: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """Vectors, or the unit vectors of integers, as sketches `(vectors, size)`."""
        buckets, signs = hashes
        if values.dim() == 1:
            sketch = torch.zeros(len(values), self.size, dtype=dtype)
            return sketch.scatter_(1, buckets[values][:, None], signs[values].to(dtype)[:, None])
        # Rows of a transposed array are added much faster than its columns.
        sketch = torch.zeros(self.size, len(values), dtype=dtype)
        return sketch.index_add_(0, buckets, (values.to(dtype) * signs).T.contiguous()).T.contiguous()
