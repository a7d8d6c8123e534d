"""What the tests need and a user's own tests may use: spawned gloo workers, tiny models."""
