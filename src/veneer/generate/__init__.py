"""Decoding: from a conversation to an answer."""
