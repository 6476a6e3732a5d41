"""Who works: processes, what they are told and answer, awake or asleep, lost or back."""
