"""fopd: asynchronous on-policy distillation with freshness control, on one box, with one command."""

__version__ = "0.1.0"
