"""Checkpoints and architectures: what is on disk, what a head does to its logits, what can be distilled."""
