"""The passage of a prompt through a model whose rows leave on the way."""
