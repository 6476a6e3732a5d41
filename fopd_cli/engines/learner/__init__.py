"""The learner: FSDP2, adapters, micro-batches, its part of a checkpoint."""
