"""Seeds of requests: distinct, reproducible, and even."""

from __future__ import annotations

import numpy as np
from scipy.stats import chi2

from me_stats.served.seeds import next_seed, request_seed


def test_seeds_differ_wherever_an_address_does() -> None:
    addresses = [(row, step) for row in (*range(150), 2**18 - 1) for step in (*range(150), 2**14 - 1)]
    for bits in (31, 32, 63):
        seeds = [request_seed(1, row, step, arm="a", bits=bits) for row, step in addresses]
        assert 0 <= min(seeds) <= max(seeds) < 2**bits - 1
        # At 31 bits they are hashed: 23,000 of them meet 0.12 times on average.
        assert len(seeds) - len(set(seeds)) <= (3 if bits == 31 else 0)
    first = request_seed(1, 0, 0, arm="a", bits=32)
    others = [request_seed(2, 0, 0, arm="a", bits=32), request_seed(1, 0, 0, arm="b", bits=32)]
    assert first not in others
    assert first == request_seed(1, 0, 0, arm="a", bits=32)


def test_rows_and_steps_out_of_the_ordinary_have_seeds_too() -> None:
    seeds = {request_seed(0, row, step, arm="a", bits=32) for row in (2**18, 2**60) for step in (0, 2**14, 10**9)}
    assert len(seeds) == 6


def test_further_parts_have_seeds_of_their_own() -> None:
    assert next_seed(5, 0, bits=32) == 5
    assert len({next_seed(seed, part, bits=32) for seed in range(50) for part in range(4)}) == 200


def test_noise_of_neighbouring_addresses_is_even() -> None:
    pairs = [
        [np.random.default_rng(request_seed(3, row, step, arm="a", bits=32)).random() for step in (0, 1)]
        for row in range(2000)
    ]
    cells = (np.array(pairs) * 4).astype(int)
    counts = np.bincount(cells[:, 0] * 4 + cells[:, 1], minlength=16)
    assert chi2.sf(((counts - 125) ** 2 / 125).sum(), 15) > 1e-6
