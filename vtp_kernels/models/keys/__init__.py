"""The keys that layers hold, and what rows see of them."""
