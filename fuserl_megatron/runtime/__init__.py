"""What keeps a run alive: rendezvous, collectives, stopping, watchdog, profiling."""
