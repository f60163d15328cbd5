"""Parameters and bytes of any model under any method, from the description of its skeleton."""
