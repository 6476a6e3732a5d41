"""Checkpoints and architectures: what lies on disk, what a head does to its logits, what can be distilled."""
