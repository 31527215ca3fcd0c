"""From OFA's TSV files to packed batches: shards, order, tasks, images, text."""
