"""What a prompt cost, and what is told of it."""
