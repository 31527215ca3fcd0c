"""What a task is: from a source row to examples, pictures of them, and what an answer is worth."""
