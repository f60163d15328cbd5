"""What other runtimes make of an adapter's files: their rules, as one table each."""
