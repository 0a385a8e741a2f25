"""What a column of labels means: the kinds of tasks, their losses, metrics and intervals."""
