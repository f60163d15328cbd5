"""The rules by which other runtimes load an adapter's files, one table for each runtime."""
