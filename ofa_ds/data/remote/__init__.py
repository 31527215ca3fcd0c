"""Shards that are elsewhere: read by record batches into a cache that all processes of a host share."""
