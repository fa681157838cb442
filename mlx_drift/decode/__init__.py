"""The round of speculative decoding: propose, verify, accept, roll back, ingest."""
