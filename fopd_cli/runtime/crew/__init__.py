"""Worker processes and engines: their messages, sleep, losses and restarts."""
