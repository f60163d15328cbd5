"""Training: the loop yields events, and the command line shows them."""
