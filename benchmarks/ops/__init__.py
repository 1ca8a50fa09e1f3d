"""What can be measured: problems, gates and contestants of each op."""
