"""Training beside serving: files of rows, jobs over them, and the process that trains."""
