"""Chat templates and vocabularies."""
