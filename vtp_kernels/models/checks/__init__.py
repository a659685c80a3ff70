"""What is found out of a model's layers before a method is applied to it."""
