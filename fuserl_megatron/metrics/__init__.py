"""What a run reports: its log, trackers, throughput."""
