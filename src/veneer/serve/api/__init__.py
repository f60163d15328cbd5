"""OpenAI's protocol over HTTP: requests and replies, errors, keys and limits, metrics."""
