"""What runs when: `schedule.py`, a pure state machine, decides; the rest is its vocabulary and inputs."""
