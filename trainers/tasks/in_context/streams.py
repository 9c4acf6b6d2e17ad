"""Random numbers that are a pure function of (seed, purpose, index), drawn for many indices at once."""

import hashlib

import numpy as np

# SplitMix64: the increment of its counter, and the multipliers of its output function.
GAMMA = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
# Numbers that are mixed at once: few enough that what is computed on the way stays in the processor's cache.
BLOCK = 2**14


def mix(values: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014, figure 16): a bijection of 64-bit integers."""
    values = values ^ (values >> SHIFTS[0])
    values *= MULTIPLIERS[0]
    values ^= values >> SHIFTS[1]
    values *= MULTIPLIERS[1]
    values ^= values >> SHIFTS[2]
    return values


class Streams:
    """One random stream for each index. What an index gets depends on no other index, nor on their order.

    Args:
        seed: at least 0.
        purpose: what the numbers are for; another purpose gives independent numbers.
        indices: at least 0, of shape `(n,)`.
    """

    def __init__(self, seed: int, purpose: str, indices: np.ndarray):
        digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
        key = np.array([int.from_bytes(digest, "little")], dtype=np.uint64)
        self._states = mix(mix(np.asarray(indices).astype(np.uint64) + np.uint64(1)) ^ key)
        self._drawn = 0

    def __len__(self) -> int:
        return len(self._states)

    def bits(self, *shape: int) -> np.ndarray:
        """64 random bits each, as `uint64` of shape `(n, *shape)`."""
        count = int(np.prod(shape))
        counters = np.arange(self._drawn + 1, self._drawn + count + 1, dtype=np.uint64) * GAMMA
        self._drawn += count
        values = (self._states[:, None] + counters).reshape(-1)
        for start in range(0, len(values), BLOCK):
            values[start : start + BLOCK] = mix(values[start : start + BLOCK])
        return values.reshape(len(self), *shape)

    def uniform(self, *shape: int) -> np.ndarray:
        """Uniform numbers in [0, 1), as `float64` of shape `(n, *shape)`."""
        return (self.bits(*shape) >> np.uint64(11)) * 2.0**-53

    def integers(self, high: int, *shape: int) -> np.ndarray:
        """Uniform integers in [0, high), for `high` below 2**31, as `int64` of shape `(n, *shape)`."""
        return ((self.bits(*shape) >> np.uint64(32)) * np.uint64(high) >> np.uint64(32)).astype(np.int64)

    def normal(self, *shape: int) -> np.ndarray:
        """Standard normal numbers by the method of Box and Muller, as `float32` of shape `(n, *shape)`."""
        count = int(np.prod(shape))
        bits = self.bits((count + 1) // 2)
        radius = ((bits >> np.uint64(32)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
        angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float32) * np.float32(2 * np.pi * 2.0**-32)
        # Rounding may carry the largest value to 1 but not above: no logarithm is positive.
        radius = np.sqrt(-2 * np.log(radius))
        pairs = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)), axis=1)
        return pairs[:, :count].reshape(len(self), *shape)

    def subset(self, size: int, count: int) -> np.ndarray:
        """`count` different integers of `range(size)` in random order, as `int64` of shape `(n, count)`.

        Args:
            size: at most 2**16.
        """
        low = np.uint64(0xFFFF)
        # The number itself in the low bits of a random key: sorting is faster than finding the order.
        keys = self.bits(size) & ~low | np.arange(size, dtype=np.uint64)
        keys.sort(axis=1)
        return (keys[:, :count] & low).astype(np.int64)
