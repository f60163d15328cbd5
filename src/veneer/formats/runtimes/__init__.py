"""Rules by which other programs (runtimes) load an adapter's files: one file for each program."""
