"""What a run leaves: counts per client, averages, tables over many runs, names of rows, plots."""
