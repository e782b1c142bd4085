"""Several ways to up-scale one base, trained alike and laid side by side: experiment files, runs, results, report."""
