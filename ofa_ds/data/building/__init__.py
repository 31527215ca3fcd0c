"""Building shards: sources are cut into pieces, each is built by itself, all are put together."""
