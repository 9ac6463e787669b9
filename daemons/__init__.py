"""The coordinator process: a ZeroMQ loop around the core's state machine, its regions and its runtime directory."""
