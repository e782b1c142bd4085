"""What the memories of a run do: counters, figures, telemetry, revival of dead sub-keys."""
