"""The coordinator process: a loop around the core's state machine, its sockets, regions and runtime directory."""
