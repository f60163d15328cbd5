"""How good a model with an adapter is: tasks of a harness, and win rates."""
