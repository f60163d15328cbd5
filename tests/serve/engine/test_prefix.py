"""The prefix cache in memory, whose limit counts what blocks take beside their numbers too."""

import torch

from veneer.generate.runners.compiled import KVBlock
from veneer.serve.engine.prefix import PrefixCache


def test_small_blocks_take_more_than_their_numbers():
    cache, limit = PrefixCache(100_000), 100_000
    hashes = [bytes([n // 256, n % 256]) for n in range(1000)]
    for number in range(len(hashes)):
        cache.add(hashes, number, KVBlock(torch.zeros(8), torch.zeros(8)))
    kept = sum(bool(cache.find([key])) for key in hashes)
    assert 0 < kept * 1000 < cache.nbytes <= limit  # 64 bytes of numbers each


def test_what_is_larger_than_the_limit_is_not_kept():
    cache = PrefixCache(1000)
    cache.add([b"a"], 0, KVBlock(torch.zeros(8), torch.zeros(8)))
    assert (cache.nbytes, cache.find([b"a"])) == (0, [])
