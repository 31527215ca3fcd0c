"""What other programs wrote, as rows of shards: each format gives items, all items become rows in one place."""
