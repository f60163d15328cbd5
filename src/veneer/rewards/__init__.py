"""What an answer is worth: a user's functions and checkers of ours, each with its time limit."""
