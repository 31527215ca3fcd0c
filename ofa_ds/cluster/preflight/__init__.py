"""Looks at every host of a hostfile before a day is spent on them. `survey` asks, `checks` judges, `report` tells."""
