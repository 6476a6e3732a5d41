"""Where code that a model wrote is run: nothing of the host is seen, reached, used up or left behind."""
