"""What the engine and the methods agree on: it knows neither."""
