"""The only code that sees configuration, data and models together: build, stages, runs, sweeps."""
