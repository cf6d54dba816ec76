"""What the scripts share: command lines, data sets, runs, figures, timing and resuming."""
