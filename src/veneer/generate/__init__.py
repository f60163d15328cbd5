"""Answers to conversations, by transformers' own generation."""
