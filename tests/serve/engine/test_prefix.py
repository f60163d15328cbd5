"""The prefix cache in memory, whose limit counts what blocks take beside their numbers too."""

import torch

import veneer
from support.random_adapters import tokenizer
from support.tiny_models import tiny
from veneer.generate.runners.compiled import KVBlock
from veneer.serve.config import ServeConfig
from veneer.serve.engine.prefix import PrefixCache
from veneer.serve.run import prepare


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


def test_the_server_s_flag_bounds_it(tmp_path):
    veneer.write_model(tiny("llama"), tokenizer(), tmp_path)
    base = veneer.load_base(tmp_path, dtype="float32")
    served, _ = prepare(base, [], ServeConfig(prefix_cache_memory=0.25))
    with served.engine as engine:
        assert engine.config.cache_bytes == 250_000_000
