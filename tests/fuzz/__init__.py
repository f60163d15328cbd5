"""Any bytes that come from elsewhere end in success or in one VeneerError, soon and in bounded
memory: parsers of foreign bytes under a fuzzer that is guided by coverage.

`python -m fuzz` (`make fuzz`) tries new bytes; `tests/fuzz/test_corpus.py` reads the kept ones.
"""
