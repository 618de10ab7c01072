"""Seeds of requests: one a (run seed, row, step, arm), so that no noise is replayed and a retry repeats its own."""

from __future__ import annotations

import hashlib

_STEP_BITS, _ROW_BITS, _HALF = 14, 18, 16  # 32 bits together


def request_seed(seed: int, row: int, step: int, *, arm: str, bits: int) -> int:
    """The seed that a request sends, in 0..2**bits - 2.

    Where 32 bits are all that a server takes, distinct (row, step) of one run get distinct seeds as long as rows stay
    below 2**18 and steps below 2**14: they are permuted, not hashed. Beyond, and over runs, two of n requests meet with
    a chance of about n² / 2**33; at 63 bits, never.

    >>> seeds = {request_seed(7, row, step, arm="me", bits=32) for row in range(200) for step in range(200)}
    >>> len(seeds)
    40000
    >>> request_seed(7, 3, 5, arm="me", bits=63) == request_seed(7, 3, 5, arm="ce", bits=63)
    False
    """
    if bits == _STEP_BITS + _ROW_BITS and row < 1 << _ROW_BITS and step < 1 << _STEP_BITS:
        address = row << _STEP_BITS | step
        while True:
            address = _permuted(address, f"{seed} {arm}")
            # The highest seed asks llama.cpp for one of its own choice; walking on keeps the map one to one.
            if address != (1 << bits) - 1:
                return address
    return _hashed(f"{seed} {row} {step} {arm}", (1 << bits) - 1)


def next_seed(seed: int, part: int, *, bits: int) -> int:
    """The seed of the further request that goes on where the one of `seed` stopped early."""
    return seed if part == 0 else _hashed(f"{seed} part {part}", (1 << bits) - 1)


def _permuted(address: int, key: str) -> int:
    """Four rounds of a Feistel network: a keyed permutation of 32-bit numbers."""
    left, right = address >> _HALF, address & (1 << _HALF) - 1
    for turn in range(4):
        left, right = right, left ^ _hashed(f"{key} {turn} {right}", 1 << _HALF)
    return left << _HALF | right


def _hashed(text: str, size: int) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big") % size
