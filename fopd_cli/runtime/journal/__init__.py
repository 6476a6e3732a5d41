"""What a run writes down: for people, for a resume, and for experiment trackers."""
