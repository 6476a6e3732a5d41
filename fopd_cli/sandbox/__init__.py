"""Where code that a model wrote runs: it cannot see, reach or use up the host, and leaves nothing behind."""
