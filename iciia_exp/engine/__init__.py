"""Engine: the graph of an experiment, training, evaluation, jobs and sweeps."""
