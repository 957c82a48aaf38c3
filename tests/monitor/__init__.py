"""FisherMonitor."""
