"""Training: the loop yields events, whoever asked for it shows them."""
