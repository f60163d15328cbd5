"""The processes of one run: which one this is, and what they exchange."""
