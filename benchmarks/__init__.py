"""What diator costs, as ratios to the same work written by hand."""
