"""Pictures and videos of a call: what is known of them, and which token shows what."""
