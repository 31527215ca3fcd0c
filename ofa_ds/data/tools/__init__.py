"""What is done with shards that are there: their rows are counted, checked, merged, divided, shuffled."""
