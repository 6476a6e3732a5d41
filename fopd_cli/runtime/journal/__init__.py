"""What a run writes down: for people, for the next start, and for whoever looks on."""
