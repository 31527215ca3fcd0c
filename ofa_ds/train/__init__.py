"""The training loop and what it needs: batches, losses, metrics, the wish to stop."""
