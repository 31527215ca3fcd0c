"""Tasks: from a source row to examples, pictures of them, and what an answer is worth. The table is in `task`."""
