"""Blocks of transformers that run fused: which ones are known (:mod:`.recognise`), and the modules they then have (:mod:`.modules`)."""
