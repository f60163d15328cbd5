"""What a model says: answers to conversations, and the runners that compute many rows at once."""
