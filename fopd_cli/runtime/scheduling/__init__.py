"""Who does what when: `schedule.py` decides, a pure state machine; the rest is its vocabulary and inputs."""
