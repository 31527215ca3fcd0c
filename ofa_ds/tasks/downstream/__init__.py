"""Downstream tasks: a file for each, with its functions and the value that `ofa_ds.tasks.task.DOWNSTREAM` lists."""
