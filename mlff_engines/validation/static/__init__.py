"""One instant: structures, and what any right model says of them (S1-S10)."""
