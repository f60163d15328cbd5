"""A search over settings: trials that share passes, of which bad ones make way for others."""
